"""A real S3 server (moto's) behind a proxy that delays what passes, cuts it off in the middle, or swallows it."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import boto3
import s3fs
from moto.server import ThreadedMotoServer

BUCKET = "checkpoints"


class Proxy:
    """Forwards TCP connections to `port`. delay: seconds before each block of a request; room: bytes of requests that still pass before everything
    is cut off and refused, None: all; swallow: takes requests and never answers."""

    def __init__(self, port: int):
        self.target, self.delay, self.swallow = port, 0.0, False
        self.room: int | None = None
        self.passed = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.room is not None and self.room <= 0:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self.target))
                threading.Thread(target=self._forward, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._forward, args=(server, client, False), daemon=True).start()

    def _forward(self, source: socket.socket, to: socket.socket, asking: bool) -> None:
        with suppress(OSError):
            while block := source.recv(65536):
                if asking:
                    time.sleep(self.delay)
                    while self.swallow:
                        time.sleep(0.05)
                    self.passed += len(block)
                    if self.room is not None:
                        block = block[: max(0, self.room)]
                        self.room -= len(block)
                to.sendall(block)
                if self.room is not None and self.room <= 0:
                    break
        for end in (source, to):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


class Store:
    """The server, its proxy, and a client of its own that sees what really lies there."""

    def __init__(self) -> None:
        self.server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        self.server.start()
        _, port = self.server.get_host_and_port()
        self.proxy = Proxy(port)
        self.client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        self.client.create_bucket(Bucket=BUCKET)

    def names(self, prefix: str = "") -> list[str]:
        listed = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        return [entry["Key"].removeprefix(prefix) for entry in listed]

    def read(self, name: str) -> bytes:
        return bytes(self.client.get_object(Bucket=BUCKET, Key=name)["Body"].read())

    def write(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=name, Body=content)

    def remove(self, name: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=name)


@contextmanager
def opened_store() -> Iterator[Store]:
    """Its address and credentials are in the environment meanwhile, as a user would give them."""
    given = {
        "AWS_ACCESS_KEY_ID": "AKIATESTINGTESTING",
        "AWS_SECRET_ACCESS_KEY": "a-secret-of-tests-only",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in (*given, "AWS_ENDPOINT_URL")}
    os.environ.update(given)
    store = Store()
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{store.proxy.port}"
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        yield store
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        store.proxy.close()
        store.server.stop()
