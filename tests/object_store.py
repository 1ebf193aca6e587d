"""A real S3 server on loopback (moto), behind a proxy that can be told to fail."""

from __future__ import annotations

import functools
import http.client
import http.server
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BUCKET = "atlastests"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}


class Proxy:
    """Forwards to a server; ``fault`` may name what goes wrong with a request.

    ``"500"`` and ``"403"`` are answers, ``"stall"`` is none for two seconds, ``"cut"`` ends the
    body half way.
    """

    def __init__(self, port: int) -> None:
        self.fault: Callable[[str, str | None], str | None] = lambda path, range: None
        self.log: list[tuple[str, str, str | None]] = []
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                proxy.log.append((self.command, self.path, self.headers["Range"]))
                fault = proxy.fault(self.path, self.headers["Range"])
                if fault in ("500", "403"):
                    self.send_response(int(fault))
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if fault == "stall":
                    time.sleep(2)
                there = http.client.HTTPConnection("127.0.0.1", port)
                there.request(self.command, self.path, headers=dict(self.headers))
                answer = there.getresponse()
                body = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") or str(len(body))
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
                if fault == "cut":
                    self.close_connection = True
                there.close()

            do_HEAD = do_GET

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                pass  # clients that gave up

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def gets(self) -> list[tuple[str, str | None]]:
        """Path and range of the GET requests so far; forgets them."""
        found = [(path, range) for method, path, range in self.log if method == "GET"]
        self.log.clear()
        return found

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()


class ObjectStore:
    """The server, its bucket, and the proxy before it."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]
        self.proxy = Proxy(self.port)
        self._client = self._connected()
        self._client.create_bucket(Bucket=BUCKET)

    def _connected(self) -> Any:
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            region_name="us-east-1",
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )

    def upload(self, folder: Path, prefix: str) -> str:
        """Copy a folder; returns its URL."""
        keys = set()
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            keys.add(f"{prefix}/{path.relative_to(folder).as_posix()}")
            self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=BUCKET, Prefix=f"{prefix}/"
        )
        there = {found["Key"] for page in pages for found in page.get("Contents", ())}
        assert keys <= there, "the server did not keep what it was given"
        return f"s3://{BUCKET}/{prefix}"

    def put(self, key: str, data: bytes) -> None:
        """Write an object."""
        self._client.put_object(Bucket=BUCKET, Key=key, Body=data, ACL="public-read")

    def delete(self, key: str) -> None:
        """Remove an object."""
        self._client.delete_object(Bucket=BUCKET, Key=key)

    @property
    def options(self) -> dict[str, str]:
        """Of the connection, through the proxy."""
        return {"endpoint": self.proxy.endpoint, "region": "us-east-1"}


@functools.cache
def shared() -> ObjectStore:
    """The one of this process; its threads end with it."""
    return ObjectStore()
