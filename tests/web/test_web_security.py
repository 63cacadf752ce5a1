"""Hostile requests get nothing: other origins, other names, other files, too much, too deep, too slow."""

import itertools
import os
import socket

import pytest

import ldm
from ldm.errors import ConfigError, ResourceError

pytest.importorskip("uvicorn")
requests = pytest.importorskip("requests")

PATHS = ("/", "/api/info", "/api/jobs", "/api/images", "/sdapi/v1/options", "/v1/models", "/docs", "/openapi.json")
POSTS = ("/api/jobs", "/api/prompt", "/api/read", "/sdapi/v1/txt2img", "/v1/images/generations", "/sdapi/v1/interrupt")
HOSTS = ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "0.0.0.0")
HOSTS += ("localhost:x", "", "127.0.0.1:7860:1", "[::2]", "127.1", "2130706433", "user@localhost", "*")
ORIGINS = ("null", "http://evil.example", "http://localhost:1", "https://localhost.evil.example", "file://", "")
NAMES = ("../ledger.sqlite3", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "/etc/passwd", "....//etc/passwd")
NAMES += ("0123456789abcdef-0.png/../../x", "0123456789abcdef-0.png%00", "..%5c..%5cwindows", ".web/ledger.sqlite3")
NAMES += (
    "%00",
    "con",
    "0123456789ABCDEF-0.png",
    "0123456789abcdef-0.svg",
    "~root",
    "0123456789abcdef-0",
    "*.png",
    ".lock",
)


def raw(client, request, seconds=10):
    """The answer's status to bytes as they are; None where the connection is closed without one."""
    host, port = client.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(request)
        try:
            answer = connection.recv(65536)
        except (ConnectionResetError, TimeoutError):
            return None
    return int(answer.split(b" ")[1]) if answer else None


def test_requests_under_another_name_are_refused(client):
    """DNS rebinding: a page's own name points here, and its scripts are of the same origin for the browser."""
    for host, path in itertools.product(HOSTS, PATHS):
        status = raw(client, f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        assert status in (400, 421), (host, path, status)
    twice = b"GET /api/info HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    assert raw(client, twice) in (400, 421)
    assert raw(client, b"GET http://evil.example/api/info HTTP/1.1\r\nHost: evil.example\r\n\r\n") in (400, 404, 421)
    assert raw(client, b"GET /api/info HTTP/1.0\r\n\r\n") in (400, 421)


def test_pages_of_other_origins_are_refused(client):
    for origin, path in itertools.product(ORIGINS, PATHS):
        assert client.get(path, headers={"Origin": origin}).status_code == 403, (origin, path)
    for origin, path in itertools.product(ORIGINS, POSTS):
        assert client.post(path, {}, headers={"Origin": origin}).status_code == 403, (origin, path)
    for site, path in itertools.product(("cross-site", "same-site"), PATHS[1:]):
        assert client.get(path, headers={"Sec-Fetch-Site": site}).status_code == 403, (site, path)
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}).status_code == 200
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}).status_code == 403
    own = client.get("/api/info", headers={"Origin": client.url, "Sec-Fetch-Site": "same-origin"})
    assert own.status_code == 200
    assert not any(name.lower().startswith("access-control") for name in own.headers)
    assert client("OPTIONS", "/api/jobs", headers={"Origin": "http://evil.example"}).status_code == 403


def test_forms_and_other_types_are_no_json(client):
    for kind, path in itertools.product(("text/plain", "application/x-www-form-urlencoded", "", "image/png"), POSTS):
        sent = client("POST", path, data=b'{"prompt": "a cat"}', headers={"Content-Type": kind})
        assert sent.status_code == 415, (kind, path)
    sent = client("POST", "/api/jobs", files={"prompt": ("a", b"a cat")})
    assert sent.status_code == 415
    assert client.post("/v1/images/edits", {"prompt": "a cat"}).status_code == 415


def test_no_other_file_is_served(client):
    for name in NAMES:
        for folder in ("/images/", "/static/", "/api/images/", "/api/jobs/", "/"):
            request = f"GET {folder}{name} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            assert raw(client, request.encode()) == 404, (folder, name)
    for name in NAMES:
        assert raw(client, f"DELETE /api/images/{name} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()) in (404, 405)


def test_a_link_in_the_place_of_an_image_is_not_followed(client, tmp_path):
    job = client.draw(seed=1)
    store = client.server.context.store
    path = store.folder / f"{job['images'][0]}.png"
    (tmp_path / "secret").write_text("secret")
    path.unlink()
    os.symlink(tmp_path / "secret", path)
    assert client.get(f"/images/{job['images'][0]}.png").status_code == 404


def test_bodies_are_bounded(client):
    assert client("POST", "/api/prompt", data=b" " * 10**6 + b"{}", headers=JSON).status_code == 413
    assert client("POST", "/api/read", data=b" " * (20 * 10**6) + b"{}", headers=JSON).status_code == 413
    for path, size in (("/api/prompt", 10**9), ("/api/jobs", 10**12), ("/api/jobs", 10**30)):
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        assert raw(client, f"{head}Content-Length: {size}\r\n\r\n".encode()) in (400, 413), (path, size)

    def chunks():
        for _ in range(30):
            yield b" " * 65536

    assert client("POST", "/api/prompt", data=chunks(), headers=JSON).status_code == 413


JSON = {"Content-Type": "application/json"}
BODIES = (
    b"",
    b"[",
    b"[]",
    b"3",
    b'"x"',
    b"null",
    b"{}",
    b'{"prompt": NaN}',
    b'{"prompt": "a", "seed": Infinity}',
    b"\xff",
)
BODIES += (
    b"[" * 20_000,
    b'{"a":' * 50_000,
    b'{"prompt": {"a": 1}}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a\\u0000b"}',
)
BODIES += (b'{"prompt": "a", "seed": 1e999}', b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", b'{"prompt": ["a"]}')
BODIES += (b'{"prompt": "a", "steps": "4"}', b'{"prompt": "a", "width": true}', b'{"prompt": "a", "lora": {"a": []}}')
BODIES += (b'{"prompt": "a", "image": {"id": 3}}', b'{"prompt": "a", "image": {"a": 1, "b": 2}}', b'{"__class__": 1}')
BODIES += (b'{"prompt": "a", "grid": "x"}', b'{"prompt": "a", "grid": [3]}', b'{"prompt": "a", "outpaint": {"up": 1}}')
BODIES += (
    b'{"prompt": "((((((", "seed": -2}',
    b'{"prompt": "a", "sigmas": [1, null]}',
    b'{"prompt": "a", "num_images": 0}',
)


def test_bodies_that_are_no_request_are_refused_and_nothing_is_said_of_the_machine(client):
    for number, body in enumerate(BODIES):
        path = POSTS[number % 5]
        sent = client("POST", path, data=body, headers=JSON)
        assert sent.status_code in (400, 413, 422) or path == "/api/prompt", (body[:60], path, sent.text[:200])
        assert sent.status_code < 500 and "Traceback" not in sent.text and "/ldm/" not in sent.text
    assert client.get("/api/jobs").json() == {"jobs": []}


@pytest.mark.slow
def test_every_such_body_is_refused_everywhere(client):
    for body, path in itertools.product(BODIES, POSTS[:5]):
        sent = client("POST", path, data=body, headers=JSON)
        assert sent.status_code in (400, 413, 422) or path == "/api/prompt", (body[:60], path, sent.text[:200])


def test_every_answer_is_sealed(client):
    image = client.draw(seed=2)["images"][0]
    for path in (
        *PATHS,
        "/static/app.js",
        "/static/style.css",
        f"/images/{image}.png",
        "/nothing",
        "/sdapi/v1/nothing",
    ):
        answer = client.get(path)
        assert answer.headers["x-content-type-options"] == "nosniff", path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "set-cookie" not in answer.headers and "server" not in answer.headers
        kind = answer.headers["content-type"].split(";")[0]
        assert kind in ("application/json", "image/png", "text/html", "text/css", "text/javascript"), path
    assert "<" not in client.post("/api/jobs", {"prompt": "x", "<script>": 1}).headers["content-type"]


def test_ranges_are_not_served(client):
    image = client.draw(seed=2)["images"][0]
    whole = client.get(f"/images/{image}.png")
    for header in ("bytes=0-1", "bytes=" + ",".join(f"{i}-{i}" for i in range(5000)), "bytes=-1", "lines=0-"):
        answer = client.get(f"/images/{image}.png", headers={"Range": header}) if len(header) < 8000 else None
        assert answer is None or (answer.status_code == 200 and answer.content == whole.content)
    assert "accept-ranges" not in whole.headers


def test_other_methods_are_refused(client):
    for method, path in itertools.product(("PUT", "PATCH", "TRACE", "CONNECT", "PROPFIND"), PATHS):
        assert client(method, path).status_code in (400, 404, 405), (method, path)


def test_an_image_bomb_is_refused_from_its_header(client):
    import base64
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
        + chunk(b"IEND", b"")
    )
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    for data in (bomb, svg, b"GIF89a", b"%PDF-1.4", b"\0" * 100, b"<html>"):
        text = base64.b64encode(data).decode()
        assert client.post("/api/jobs", {"prompt": "a cat", "image": text}).status_code == 422
        assert client.post("/api/read", {"image": text}).status_code == 422
        assert client.post("/sdapi/v1/png-info", {"image": text}).status_code == 422
        form = {"prompt": (None, "a cat"), "image": ("x.png", data)}
        assert client("POST", "/v1/images/edits", files=form).status_code == 422


def test_metadata_of_a_hostile_png_opens_no_file(client, tmp_path):
    import base64

    from PIL import Image

    from ldm.images import Metadata, encode

    own = {"prompt": "a", "model": "/etc/passwd", "vae": "/etc/passwd", "image": "/etc/passwd", "image_sha256": "x"}
    own |= {"lora": [{"name": "x", "path": "/etc/passwd", "weight": 1}, 3], "mask_image": "/etc/shadow"}
    for metadata in (Metadata("", own), Metadata("a <lora:../../etc/passwd:1>\nSteps: 2, Model: /etc/passwd")):
        data = encode(Image.new("RGB", (8, 8)), "png", metadata)
        found = client.post("/api/read", {"image": base64.b64encode(data).decode()}).json()
        assert not {"model", "vae", "image", "mask_image", "lora"} & set(found.get("fields", {}))


def test_another_address_needs_a_token(tmp_path, tiny_folder):
    for wrong in ({}, {"token": "short"}, {"token": "with space in it 12345"}):
        with pytest.raises(ConfigError, match=r"listen|token"):
            ldm.web(tmp_path / "g", model=tiny_folder, listen="0.0.0.0", port=0, block=False, **wrong)
    assert not (tmp_path / "g").exists()


def test_with_a_token_nothing_but_the_empty_page_is_given_away(tmp_path, tiny_folder):
    token = "0123456789abcdef-secret"
    served = ldm.web(tmp_path / "g", model=tiny_folder, port=0, block=False, token=token)
    try:
        assert served.page.endswith(f"/#token={token}")
        for path in PATHS[1:]:
            for header in (None, "Bearer wrong", f"Basic {token}", "Bearer", token, f"bearer {token[:-1]}"):
                headers = {} if header is None else {"Authorization": header}
                assert requests.get(served.url + path, headers=headers, timeout=10).status_code == 401, (path, header)
            assert requests.get(f"{served.url}{path}?token={token}", timeout=10).status_code == 401
            assert requests.get(served.url + path, headers={"Authorization": f"Bearer {token}"}, timeout=10).ok
            assert requests.get(served.url + path, auth=("any", token), timeout=10).ok
        page = requests.get(served.url, timeout=10)
        assert page.ok and token not in page.text
    finally:
        served.close()


def test_one_server_a_folder(client, tiny_folder):
    folder = client.server.context.store.folder
    with pytest.raises(ResourceError, match="in use by process"):
        ldm.web(folder, model=tiny_folder, port=0, block=False)
