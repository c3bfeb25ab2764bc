"""The public repository's name in pyproject.toml, where the ComfyUI registry reads links to it, the icon and the banner.

python .github/registry.py OWNER/NAME                   write them, once
python .github/registry.py OWNER/NAME --check v0.1.0    fail unless they are there and the tag is the version
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

PYPROJECT = Path("pyproject.toml")


def with_repository(text: str, repository: str) -> str:
    """pyproject.toml with the links of a repository, in place of any others."""
    text = re.sub(r'^\[project\.urls\]\nRepository = ".*"\n\n', "", text, flags=re.MULTILINE)
    urls = f'[project.urls]\nRepository = "https://github.com/{repository}"\n\n'
    text = text.replace("[project.optional-dependencies]\n", f"{urls}[project.optional-dependencies]\n", 1)
    files = rf"\1https://raw.githubusercontent.com/{repository}/HEAD/docs/"
    return re.sub(r'^((?:Icon|Banner) = ")(?:https://.*/)?docs/', files, text, flags=re.MULTILINE)


def version_of(text: str) -> str:
    found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    return found[1] if found else ""


def main() -> str | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", help="OWNER/NAME")
    parser.add_argument("--check", metavar="TAG", help="write nothing")
    options = parser.parse_args()
    text = PYPROJECT.read_text(encoding="utf-8")
    wanted = with_repository(text, options.repository)
    if options.check is None:
        PYPROJECT.write_text(wanted, encoding="utf-8")
        return None
    if options.check != f"v{version_of(text)}":
        return f"the tag is {options.check} and the version in pyproject.toml {version_of(text)}"
    if wanted != text:
        return f"pyproject.toml does not link to {options.repository}: run `python .github/registry.py {options.repository}`"
    return None


if __name__ == "__main__":
    sys.exit(main())
