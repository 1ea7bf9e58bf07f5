"""What a half-made data set says of itself: the recipe, which shards are finished, and so what in its folder is ours.

They lie in `preparing/` until the manifest is written. Before the first of them is, nothing may be there under a name
that `prepare` writes: whatever has such a name later was made by it.
"""

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from etils import epath

from lmjax.data.config import PrepareConfig
from lmjax.data.prepare.corpus import division
from lmjax.data.prepare.sources import InputFile, contents, stamps
from lmjax.data.store.manifest import FILE
from lmjax.data.store.shards import TOKENIZER
from lmjax.errors import DataError, LmjaxError
from lmjax.record import formats
from lmjax.record.files import hash_bytes, locked, read_bytes, reporting, write_bytes

FOLDER = "preparing"
TOKENIZER_DONE = "tokenizer.json"
_RECIPE = "recipe.json"
_SHARD = re.compile(r"(train|valid)-\d{5,}\.json")
_OURS = re.compile(
    rf"((train|valid)-\d{{5,}}\.(tokens|documents|checksums|scored|weights)|{re.escape(FILE)})(\.tmp)?|{TOKENIZER}"
)
_RECORDS = re.compile(rf"({_SHARD.pattern}|{re.escape(TOKENIZER_DONE)}|{re.escape(_RECIPE)})(\.tmp)?|lock")


def recipe_of(cfg: PrepareConfig, files: tuple[InputFile, ...]) -> dict[str, Any]:
    """The choices that fix the result, and a hash of the input files' names and sizes, as JSON."""
    choices = dataclasses.asdict(cfg)
    del choices["workers"], choices["document_bytes"]
    listing = "\n".join(f"{file.path.name} {file.size}" for file in files)
    return json.loads(json.dumps(choices | {"files": hash_bytes(listing.encode("utf-8", "surrogateescape"))}))


def difference(was: dict[str, Any], wanted: dict[str, Any], files: tuple[InputFile, ...]) -> str:
    """The first choice in which two recipes differ, with both values; empty if they are equal.

    What a recipe of an earlier version does not name has its default. Input files may lie elsewhere than they did,
    where `edited` can tell that they are the same.
    """
    moved = bool(files) and "contents" in was and was.get("files") == wanted["files"]
    defaults = recipe_of(PrepareConfig(), ())
    was = {**defaults, **was, "tokenizer": {**defaults["tokenizer"], **was.get("tokenizer", {})}}
    pairs = {key: (was[key], value) for key, value in wanted.items() if key != "tokenizer"}
    pairs |= {f"tokenizer.{key}": (was["tokenizer"][key], value) for key, value in wanted["tokenizer"].items()}
    for key, (old, new) in sorted(pairs.items()):
        if old != new and not (key == "inputs" and moved):
            return "the input files changed since" if key == "files" else f"{key} was {old!r}, now {new!r}"
    return ""


def edited(was: dict[str, Any], files: tuple[InputFile, ...]) -> str:
    """Says so where a file was edited without changing its size. Their times tell that they were not touched; those of
    files that were are read. Recipes of earlier versions say neither."""
    if not files or "contents" not in was or was["stamps"] == stamps(files) or was["contents"] == contents(files):
        return ""
    return "the input files changed since"


def check_unedited(recipe: dict[str, Any], directory: epath.Path, files: tuple[InputFile, ...]) -> None:
    """Raise DataError when input files were edited while they were read: then old text stands beside new."""
    if differing := edited(recipe, files):
        raise DataError(f"{differing} {directory} was begun; delete that directory, and prepare again")


def begin_or_continue(cfg: PrepareConfig, directory: epath.Path, files: tuple[InputFile, ...]) -> dict[str, Any]:
    """The recipe as recorded: by an interrupted run, or now, once it is sure that no file of others is in the way.

    The beginning of another recipe makes way, which is said, as long as none of its shards is finished. Raises
    DataError where one is: that may have taken days, and is not ours to delete.
    """
    path, recipe = directory / FOLDER / _RECIPE, recipe_of(cfg, files)
    if path.exists():
        was = _read_recipe(path)
        differing = difference(was, recipe, files) or edited(was, files)
        if not differing:
            return {"division": cfg.split, **was}
        if any(_SHARD.fullmatch(file.name) for file in (directory / FOLDER).iterdir()):
            raise DataError(
                f"{directory} holds a half-made data set of another recipe: {differing}; finish that one, delete the "
                "directory, or use another"
            )
        print(f"note: {directory} had not come to a shard yet, and starts over: {differing}", file=sys.stderr)
        (directory / FOLDER / TOKENIZER_DONE).unlink(missing_ok=True)
    elif foreign := _foreign(directory):
        raise DataError(f"{directory} holds {foreign}, which no prepare has made there; use a new directory")
    recipe |= {"contents": contents(files), "stamps": stamps(files), "division": division(files, cfg)}
    recipe |= {formats.STAMP: formats.version()}
    write_bytes(path, json.dumps(recipe).encode())
    return recipe


def _read_recipe(path: epath.Path) -> dict[str, Any]:
    try:
        recipe = json.loads(read_bytes(path))
        if not isinstance(recipe, dict) or not isinstance(recipe.get("tokenizer"), dict):
            raise ValueError("not a recipe")
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); delete the directory, or use another") from error
    return recipe


def _foreign(directory: epath.Path) -> str | None:
    """A file or folder, of a name that is to be written, that is there before anything was."""
    begun = ("lock", f"{_RECIPE}.tmp")  # by a run that was killed before it had a recipe
    records = [file for file in (directory / FOLDER).iterdir() if _RECORDS.fullmatch(file.name)]
    found = [f"{FOLDER}/{file.name}" for file in records if file.name not in begun or file.stat().length]
    found += [file.name for file in directory.iterdir() if _OURS.fullmatch(file.name)]
    return min(found, default=None)


@contextlib.contextmanager
def folder(directory: epath.Path) -> Iterator[None]:
    """`preparing/`, made and kept to this process. What fails before its first shard is done leaves nothing behind."""
    new = not directory.exists()
    (directory / FOLDER).mkdir(parents=True, exist_ok=True)
    with locked(directory / FOLDER):
        try:
            yield
        except LmjaxError:
            _give_up(directory)
            if new and directory.exists() and not any(directory.iterdir()):
                directory.rmdir()
            raise


def _give_up(directory: epath.Path) -> None:
    """Take away a beginning. What no readable recipe says is ours stays, and so does what has come to a shard."""
    path = directory / FOLDER / _RECIPE
    if (directory / FILE).exists():  # another process has finished it
        return
    if not path.exists():
        if _foreign(directory) is None:
            remove(directory)
    elif not any(_SHARD.fullmatch(file.name) for file in (directory / FOLDER).iterdir()):
        with contextlib.suppress(DataError):
            _read_recipe(path)
            for file in [file for file in directory.iterdir() if _OURS.fullmatch(file.name)]:
                file.rmtree() if file.is_dir() else file.unlink()
            remove(directory)


def remove(directory: epath.Path) -> None:
    """Take the records away, once there is a manifest; what somebody else put beside them stays."""
    records = directory / FOLDER
    with reporting(directory, "write"):
        for file in records.iterdir():
            if _RECORDS.fullmatch(file.name):
                file.unlink()
        if records.exists() and not any(records.iterdir()):  # in a bucket it went with the last of them
            records.rmdir()
