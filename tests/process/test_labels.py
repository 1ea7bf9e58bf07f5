"""Who says what where many runs share a process."""

import sys
import threading
from typing import Any

from lmjax.process import labels


def test_lines_are_whole_and_say_whose_they_are(capsys: Any) -> None:
    def speak(name: str) -> None:
        with labels.under(name):
            for number in range(200):
                print(name, number, flush=True)
                sys.stderr.write(f"{name} {number}, ")
                sys.stderr.write("and on\nand ")
            print(file=sys.stderr)

    with labels.labelling():
        threads = [threading.Thread(target=speak, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print("nobody's")
        assert not sys.stdout.isatty()
    print("as before")
    out, err = (text.splitlines() for text in capsys.readouterr())
    assert out[-2:] == ["nobody's", "as before"]
    for name in "abc":
        assert [line for line in out if line.startswith(f"[{name}]")] == [f"[{name}] {name} {i}" for i in range(200)]
        said = [line for line in err if line.startswith(f"[{name}]")]
        assert said[1] == f"[{name}] and {name} 1, and on" and said[-1] == f"[{name}] and " and len(said) == 201


def test_the_end_is_read_back(capsys: Any) -> None:
    with labels.labelling(), labels.under("0003"):
        labels.ended(75)
    spoken = labels.LABELLED.fullmatch(capsys.readouterr().err.rstrip("\n"))
    assert spoken and spoken[1] == "0003"
    ended = labels.ENDED.fullmatch(spoken[2])
    assert ended and ended[1] == "75"
