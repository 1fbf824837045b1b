// SPDX-License-Identifier: Apache-2.0
//
// agent.mjs FILE PORT: an agent that tries the same things again and again, and prints
// what came of them whenever that changes: reading a file, writing to FILE, writing to a
// descriptor that was opened earlier, connecting to PORT of this host.

import fs from "node:fs";
import net from "node:net";

const [file, port] = [process.argv[2], Number(process.argv[3])];
let kept; // opened for writing once that was possible

function tried(what) {
  try {
    what();
    return "ok";
  } catch (e) {
    return e.code;
  }
}

function write() {
  const fd = fs.openSync(file, "a");
  fs.writeSync(fd, "line\n");
  if (kept === undefined) kept = fd;
  else fs.closeSync(fd);
}

function connect() {
  return new Promise((resolve) => {
    const socket = net.connect(port, "127.0.0.1");
    socket.on("connect", () => (socket.destroy(), resolve("ok")));
    socket.on("error", (e) => resolve(e.code));
  });
}

let last = "";
for (;;) {
  const now = [
    "read=" + tried(() => fs.readFileSync(process.argv[1])),
    "write=" + tried(write),
    "kept=" + (kept === undefined ? "none" : tried(() => fs.writeSync(kept, "kept\n"))),
    "connect=" + (await connect()),
  ].join(" ");
  if (now !== last) console.log((last = now));
  await new Promise((resolve) => setTimeout(resolve, 20));
}
