"""A server on this machine that behaves like the public buckets, and misbehaves when asked to."""

import hashlib
import http.server
import threading
from collections import Counter, defaultdict
from contextlib import contextmanager
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 3
"""Number of files on a page of a list, so that lists have several pages."""


class Bucket:
    """Files by key, and what goes wrong with the next requests of a key.

    Faults: "503", "429", "404", "drop" (half of the rest, then the connection ends), "stall" (nothing, and
    it ends), "wrong" (other bytes), "short" (a length that is too small), "long" (further bytes),
    "whole" (ranges are ignored), "other range", "416", "redirect".
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.documents: dict[str, bytes] = {}
        self.requests = Counter()
        self.ranges: list[str] = []
        self.lock = threading.Lock()
        self.url = ""

    def next_fault(self, key: str) -> str:
        with self.lock:
            self.requests[key] += 1
            return self.faults[key].pop(0) if self.faults[key] else ""

    def listing(self, prefix: str, token: str) -> bytes:
        keys = [key for key in sorted(self.files) if key.startswith(prefix)]
        start = int(token or 0)
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><ETag>&quot;{self.etag(key)}&quot;</ETag>"
            f"<Size>{len(self.files[key])}</Size></Contents>"
            for key in keys[start : start + PAGE]
        )
        more = start + PAGE < len(keys)
        further = f"<NextContinuationToken>{start + PAGE}</NextContinuationToken>" if more else ""
        namespace = "http://s3.amazonaws.com/doc/2006-03-01/"
        return f'<ListBucketResult xmlns="{namespace}">{entries}{further}</ListBucketResult>'.encode()

    def etag(self, key: str) -> str:
        return self.etags.get(key) or hashlib.md5(self.files[key]).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def log_message(self, *args):
        pass

    def do_GET(self):
        parts = urlsplit(self.path)
        key, query = unquote(parts.path).lstrip("/"), parse_qs(parts.query)
        fault = self.bucket.next_fault(key)
        if fault.isdecimal():
            self._answer(int(fault), b"<Error/>", {"Retry-After": "0"})
        elif fault == "redirect":
            self._answer(307, b"", {"Location": self.path})
        elif "list-type" in query:
            token = query.get("continuation-token", [""])[0]
            self._answer(200, self.bucket.listing(query["prefix"][0], token))
        elif key in self.bucket.documents:
            self._answer(200, self.bucket.documents[key])
        elif key in self.bucket.files:
            self._send_file(key, fault)
        else:
            self._answer(404, b"<Error/>")

    def _send_file(self, key: str, fault: str):
        content = self.bucket.files[key]
        asked = self.headers.get("Range", "")
        self.bucket.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and fault != "whole" else 0
        if fault == "wrong":
            content = bytes(255 - byte for byte in content)
        if fault == "short":
            content = content[: len(content) // 2]
        if fault == "long":
            content += b"more" * 1000
        body, headers = content[start:], {}
        if start:
            said = start + 1 if fault == "other range" else start
            headers = {"Content-Range": f"bytes {said}-{len(content) - 1}/{len(content)}"}
        cut = {"drop": len(body) // 2, "stall": 0}.get(fault)
        self._answer(206 if start else 200, body, headers, cut)

    def _answer(self, status: int, body: bytes, headers=None, cut: int | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """A client that hangs up is no error here."""


@contextmanager
def serve_bucket():
    """A `Bucket` that answers at `bucket.url` meanwhile."""
    bucket = Bucket()
    handler = type("Handler", (_Handler,), {"bucket": bucket})
    with _Server(("127.0.0.1", 0), handler) as server:
        bucket.url = f"http://127.0.0.1:{server.server_port}/"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield bucket
        server.shutdown()
