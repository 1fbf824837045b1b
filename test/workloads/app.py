# SPDX-License-Identifier: Apache-2.0
"""A Python workload: threads, children, HTTP, files. Prints the same lines on every run."""
import hashlib, http.server, os, subprocess, sys, tempfile, threading, urllib.request
from concurrent.futures import ThreadPoolExecutor

CHILD = "import sys; print(sys.stdin.read().upper(), end='')"


def threads():
    lock, total = threading.Lock(), 0

    def add(i):
        nonlocal total
        for j in range(2000):
            with lock:
                total += i * j % 7

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    return total


def children():
    running = [
        subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    out = [p.communicate(f"child {i}")[0] for i, p in enumerate(running)]
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    return out, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def network():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = hashlib.sha256(self.path.encode()).hexdigest().encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        digest = hashlib.sha256()
        for i in range(20):
            with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/{i}") as r:
                digest.update(r.read())
        server.shutdown()
        thread.join()
    return digest.hexdigest()


def files():
    with tempfile.TemporaryDirectory() as d:
        for i in range(20):
            with open(f"{d}/{i}.new", "w") as f:
                f.write("x" * i)
            os.rename(f"{d}/{i}.new", f"{d}/{i}")
        return sum(os.stat(f"{d}/{n}").st_size for n in os.listdir(d))


for part in threads, children, network, files:
    print(part.__name__, part(), flush=True)
