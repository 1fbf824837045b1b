#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Switch an instance's phase: switch.py INSTANCE PHASE

Exits as `syslatch phase set` does: 0 the phase holds, 3 refused and nothing has
changed, 4 in force for new calls only, 1 anything else.
"""

import http.client
import json
import os
import socket
import sys
from urllib.parse import quote

SOCKET = os.environ.get("SYSLATCH_SOCKET", "/run/syslatch/api.sock")


class Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path, timeout):
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def ask(method, path, body=None, headers=None):
    """Return the status, the ETag and the answer."""
    connection = Connection(SOCKET, timeout=10)  # more than the switch may take
    try:
        connection.request(method, path, body and json.dumps(body), headers or {})
        response = connection.getresponse()
        return response.status, response.getheader("ETag"), json.load(response)
    finally:
        connection.close()


def main(instance, phase):
    path = f"/v1/instances/{quote(instance, safe='')}/phase"
    status, generation, answer = ask("GET", path)
    if status == 200:
        # If-Match: only if nobody has switched since we looked. Where the phase holds
        # already this changes nothing.
        status, _, answer = ask("PUT", path, {"phase": phase, "timeout": "5s"}, {"If-Match": generation})
    if status == 200:
        print(f"{answer['phase']}: {answer['state']}, generation {answer['generation']}")
        for gap in answer["uncovered"]:
            print(f"not enforced: {gap}")
        return 0
    print(f"switch.py: {answer['detail']}", file=sys.stderr)
    problem = answer["type"].rsplit("/", 1)[-1]
    return {"transition-refused": 3, "other-generation": 3, "switch-incomplete": 4}.get(problem, 1)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        sys.exit(main(*sys.argv[1:]))
    except OSError as error:
        sys.exit(f"switch.py: {SOCKET}: {error}")
