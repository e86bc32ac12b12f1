"""The pages of notebooks: their cells and stored outputs as Markdown, their pictures as files."""

import base64
import json
from pathlib import Path


def notebook_page(path: Path) -> dict[str, str | bytes]:
    """Return the page of a notebook and its pictures, by their paths in the site."""
    parts, pictures = [], {}
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(fenced(text, "python"))
        for place, output in enumerate(cell["outputs"]):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{number}_{place}.png"
                pictures[f"notebooks/{name}"] = base64.b64decode(data["image/png"])
                parts.append(f"![output of the cell above]({name})")
            elif "text/html" in data:
                parts.append("".join(data["text/html"]))
            else:
                parts.append(fenced("".join(output.get("text", data.get("text/plain", ""))), "text"))
    return {f"notebooks/{path.stem}.md": "\n\n".join(parts) + "\n", **pictures}


def fenced(text: str, language: str) -> str:
    """Return a block of code of Markdown."""
    return f"```{language}\n{text.rstrip()}\n```"
