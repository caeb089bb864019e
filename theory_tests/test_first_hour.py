"""`.ci/first_hour.py` follows a page literally: what is right passes, and whatever differs is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RIGHT = """# A page

```python
x = 2.0 / 3.0
print('a', x)
```

```
a 0.6666666666
```

```python
print(x * 3)
```

```
2.0
```
"""


def follow(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, ".ci/first_hour.py", "--here", "--no-notebooks", str(page)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_page_that_says_what_is_printed(tmp_path):
    found = follow(tmp_path, RIGHT)
    assert found.returncode == 0, found.stderr
    assert "2 outputs are as the pages say" in found.stdout


@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("a 0.6666666666", "a 0.66666", "printed '0.6666666666666666' where the page says '0.66666'"),
        ("a 0.6666666666", "b 0.6666666666", "printed 'a' where the page says 'b'"),
        ("a 0.6666666666", "a 0.6666666666 more", "printed 'nothing' where the page says 'more'"),
        ("\n2.0\n", "\n-2.0\n", "printed '2.0' where the page says '-2.0'"),
        ("print(x * 3)", "print(y * 3)", "NameError"),
        ("x = 2.0 / 3.0\n", "print('more')\nx = 2.0 / 3.0\n", "printed 'more' where the page says 'a'"),
        ("x = 2.0 / 3.0\n", "import os\nos._exit(3)\n", "the interpreter ended"),
    ],
)
def test_what_differs_is_named(tmp_path, right, wrong, named):
    assert right in RIGHT
    found = follow(tmp_path, RIGHT.replace(right, wrong))
    assert found.returncode == 1
    assert named in found.stderr and "page.md, line" in found.stderr


def test_a_page_without_outputs_is_no_test(tmp_path):
    found = follow(tmp_path, "```python\nx = 1\n```\n")
    assert found.returncode == 1 and "no output to compare" in found.stderr


def test_commands_are_not_run_here(tmp_path):
    found = follow(tmp_path, f"```bash\ntouch {tmp_path}/installed\n```\n" + RIGHT)
    assert found.returncode == 0 and not (tmp_path / "installed").exists()
