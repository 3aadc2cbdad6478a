"""docs/models.md: the registry's architectures, with what the README of each folder says of them.

python scripts/models.py           writes it
python scripts/models.py --check   fails if it is not what would be written
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vllm_ms_models import registry  # noqa: E402 (of this folder, not of an installed package)
from vllm_ms_models.cli.listing import kinds_of  # noqa: E402

TARGET = ROOT / "docs" / "models.md"
HEAD = """# Supported models

Made by `make docs` from the registry and from the README of each model's folder. `vllm-ms list` prints the same for an
installation, with the architectures that other packages add; `vllm-ms list --lines` counts their lines.
`vllm-ms doctor MODEL` says whether a checkpoint loads.

| architecture | checkpoints | dtypes | kinds | CPU | Ascend | folder |
| --- | --- | --- | --- | --- | --- | --- |
"""
TAIL = """
Kinds: *text* generates; *embedding* and *classification* are what [vllm serve --runner pooling](pooling.md) makes of a
model; a *draft* proposes tokens to a model ([speculation.md](speculation.md)). Features are in
[features.md](features.md), quantized checkpoints in [quantization.md](quantization.md). Another architecture:
[add_a_model.md](add_a_model.md).
"""
NAME = re.compile(r"`(\w+)`")
LINK = re.compile(r"\]\((?:\.\./)+docs/")  # as a folder's README has it


def described(folder: Path) -> dict[str, list[str]]:
    """Architecture -> checkpoints, dtypes, CPU and Ascend, from the first table of the README; {} without one."""
    path = folder / "README.md"
    rows: dict[str, list[str]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 5:
            for name in NAME.findall(cells[0]):
                rows.setdefault(name, [LINK.sub("](", cell) for cell in cells[1:]])
        elif rows and not line.startswith("|"):
            break
    return rows


def page() -> str:
    lines = []
    for architecture, module in sorted((registry.BUILT_IN | registry.DRAFTS).items()):
        kinds = kinds_of(architecture)
        folder = module.split(".")[1]
        checkpoints, dtypes, *devices = described(ROOT / "vllm_ms_models" / folder).get(architecture, ["-"] * 4)
        link = f"[{folder}](../vllm_ms_models/{folder})"
        cells = [f"`{architecture}`", checkpoints, dtypes, ", ".join(kinds), *devices, link]
        lines.append(f"| {' | '.join(cells)} |")
    return HEAD + "\n".join(lines) + "\n" + TAIL


def main(arguments: list[str]) -> int:
    text = page()
    if "--check" not in arguments:
        TARGET.write_text(text)
        print(f"{TARGET.relative_to(ROOT)} was written.")
    elif not TARGET.exists() or TARGET.read_text() != text:
        print("docs/models.md is not what the registry and the folders' READMEs say; run `make docs`.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
