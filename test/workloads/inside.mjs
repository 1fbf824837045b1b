// SPDX-License-Identifier: Apache-2.0
//
// inside.mjs PHASE...: asks this container's own socket for each phase, and prints the
// status of the answers.

import http from "node:http";

for (const phase of process.argv.slice(2)) {
  const status = await new Promise((resolve) => {
    const request = http.request(
      { socketPath: "/run/syslatch/phase.sock", path: "/v1/phase", method: "PUT", agent: new http.Agent({ keepAlive: true, maxSockets: 1 }) },
      (response) => (response.resume(), response.on("end", () => resolve(response.statusCode))),
    );
    request.on("error", (e) => resolve(e.code));
    request.end(JSON.stringify({ phase }));
  });
  console.log(`${phase}: ${status}`);
}
