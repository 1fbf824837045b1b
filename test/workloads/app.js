// SPDX-License-Identifier: Apache-2.0
// A Node workload: worker threads, children, HTTP, files. Prints the same lines
// on every run.
'use strict';
const { Worker, isMainThread, parentPort, workerData } = require('worker_threads');
const { execFile, spawn } = require('child_process');
const crypto = require('crypto');
const fs = require('fs');
const http = require('http');
const os = require('os');
const path = require('path');

if (!isMainThread) {
  let sum = 0;
  for (let i = 0; i < 200000; i++) sum += (i * workerData) % 7;
  parentPort.postMessage(sum);
  return;
}

const worker = (n) => new Promise((resolve, reject) => {
  new Worker(__filename, { workerData: n }).once('message', resolve).once('error', reject);
});

const echo = (text) => new Promise((resolve, reject) => {
  const child = spawn('/bin/cat', { stdio: ['pipe', 'pipe', 'inherit'] });
  let out = '';
  child.stdout.on('data', (d) => { out += d; });
  child.on('error', reject).on('close', (code) => resolve(`${out} ${code}`));
  child.stdin.end(text);
});

const nested = () => new Promise((resolve, reject) => {
  execFile(process.execPath, ['-e', 'console.log(6 * 7)'], (err, out) => err ? reject(err) : resolve(out.trim()));
});

async function network() {
  const server = http.createServer((req, res) => res.end(crypto.createHash('sha256').update(req.url).digest('hex')));
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  const sum = crypto.createHash('sha256');
  for (let i = 0; i < 20; i++) {
    sum.update(await new Promise((resolve, reject) => {
      http.get({ port: server.address().port, host: '127.0.0.1', path: `/${i}`, agent: false }, (res) => {
        let body = '';
        res.on('data', (d) => { body += d; }).on('end', () => resolve(body));
      }).on('error', reject);
    }));
  }
  server.close();
  return sum.digest('hex');
}

async function files() {
  const dir = await fs.promises.mkdtemp(path.join(os.tmpdir(), 'app-'));
  for (let i = 0; i < 20; i++) {
    await fs.promises.writeFile(path.join(dir, `${i}.new`), 'x'.repeat(i));
    await fs.promises.rename(path.join(dir, `${i}.new`), path.join(dir, `${i}`));
  }
  const names = await fs.promises.readdir(dir);
  await fs.promises.rm(dir, { recursive: true });
  return names.length;
}

// Worker pool of libuv, and a heap large enough for the collector's threads.
const hash = () => new Promise((resolve, reject) => {
  const heap = [];
  for (let i = 0; i < 200000; i++) heap.push({ i, s: String(i) });
  crypto.pbkdf2('p', String(heap.length), 1000, 16, 'sha256', (err, key) => err ? reject(err) : resolve(key.toString('hex')));
});

(async () => {
  console.log('workers', (await Promise.all([1, 2, 3].map(worker))).join(' '));
  console.log('children', (await Promise.all(['a', 'b'].map(echo))).join(', '), await nested());
  console.log('network', await network());
  console.log('files', await files());
  console.log('hash', await hash());
})().catch((err) => { console.error(err); process.exit(1); });
