"""A stand-in for the Hugging Face hub: repositories of models in memory, and the part of its interface in use."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_test"


class Handler(BaseHTTPRequestHandler):
    """Requests to `server.repositories`, {repository: [files of each commit]}."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def commit(self, repo, revision):
        """The number and the files of a commit; None after an answer that says what is missing."""
        commits = self.server.repositories.get(repo)
        if commits is None:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        number = {"main": len(commits) - 1, **{sha(i): i for i in range(len(commits))}, "first": 0}.get(revision)
        if number is None:
            return self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        return number, commits[number]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if found := self.commit(match[1], match[2] or "main"):
                siblings = [{"rfilename": name} for name in found[1]]
                self.answer(200, {"id": match[1], "sha": sha(found[0]), "siblings": siblings})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            if found := self.commit(match[1], match[2]):
                rows = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in found[1].items()
                ]
                self.answer(200, rows)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if found := self.commit(match[1], match[2]):
                if match[3] not in found[1]:
                    self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
                else:
                    data = found[1][match[3]]
                    headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": sha(found[0])}
                    self.answer(200, data, **headers)
        else:
            self.answer(404, {"error": f"no {path}"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            given = json.loads(body)
            repo = "/".join(filter(None, (given.get("organization"), given["name"])))
            if self.server.repositories.setdefault(repo, [{}]) != [{}]:
                return self.answer(409, {"url": f"{self.server.address}/{repo}"})
            return self.answer(200, {"url": f"{self.server.address}/{repo}", "id": repo})
        repo = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        deleted = {line["value"]["path"] for line in lines if line["key"] == "deletedFile"}
        commits = self.server.repositories[repo]
        commits.append({**{name: data for name, data in commits[-1].items() if name not in deleted}, **files})
        number = len(commits) - 1
        return self.answer(
            200, {"commitUrl": f"{self.server.address}/{repo}/commit/{sha(number)}", "commitOid": sha(number)}
        )


def sha(number):
    """The identifier of the commit of this number."""
    return hashlib.sha1(str(number).encode()).hexdigest()


def start():
    """A server in a thread of its own; call `shutdown` and `server_close`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repositories, server.address = {}, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server
