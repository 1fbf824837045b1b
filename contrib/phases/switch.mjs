#!/usr/bin/env node
// SPDX-License-Identifier: Apache-2.0
//
// Switch an instance's phase: switch.mjs INSTANCE PHASE
//
// Exits as `syslatch phase set` does: 0 the phase holds, 3 refused and nothing has
// changed, 4 in force for new calls only, 1 anything else.

import http from 'node:http';

const socketPath = process.env.SYSLATCH_SOCKET || '/run/syslatch/api.sock';

// ask resolves to the status, the ETag and the answer.
function ask(method, path, body, headers = {}) {
  return new Promise((resolve, reject) => {
    // The time is more than the switch may take.
    const request = http.request({ socketPath, method, path, headers, timeout: 10_000 }, (response) => {
      let text = '';
      response.setEncoding('utf8');
      response.on('data', (chunk) => { text += chunk; });
      response.on('error', reject);
      response.on('end', () => {
        try {
          resolve({ status: response.statusCode, etag: response.headers.etag, answer: JSON.parse(text) });
        } catch (error) {
          reject(error);
        }
      });
    });
    request.on('timeout', () => request.destroy(new Error('no answer')));
    request.on('error', reject);
    request.end(body && JSON.stringify(body));
  });
}

async function main(instance, phase) {
  const path = `/v1/instances/${encodeURIComponent(instance)}/phase`;
  let { status, etag, answer } = await ask('GET', path);
  if (status === 200) {
    // If-Match: only if nobody has switched since we looked. Where the phase holds
    // already this changes nothing.
    ({ status, answer } = await ask('PUT', path, { phase, timeout: '5s' }, { 'If-Match': etag }));
  }
  if (status === 200) {
    console.log(`${answer.phase}: ${answer.state}, generation ${answer.generation}`);
    for (const gap of answer.uncovered) console.log(`not enforced: ${gap}`);
    return 0;
  }
  console.error(`switch.mjs: ${answer.detail}`);
  const problem = answer.type.split('/').pop();
  return { 'transition-refused': 3, 'other-generation': 3, 'switch-incomplete': 4 }[problem] ?? 1;
}

const [instance, phase, ...more] = process.argv.slice(2);
if (!instance || !phase || more.length > 0) {
  console.error('usage: switch.mjs INSTANCE PHASE');
  process.exitCode = 1;
} else {
  try {
    process.exitCode = await main(instance, phase);
  } catch (error) {
    console.error(`switch.mjs: ${socketPath}: ${error.message}`);
    process.exitCode = 1;
  }
}
