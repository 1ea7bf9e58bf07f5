"""Do the tests bite? Deliberately broken variants of the code, each with a test that must fail on it.

    python -m tests.faults.variants [GROUP ...]

Each variant is made in a copy of the package, where its test then runs; at the end stands the score, which must be
100%. A variant that the test does not notice says that a promise is not held by it.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
_COPIED = ("lmjax", "launch", "analysis", "tests", "configs", "pyproject.toml")


class Variant(NamedTuple):
    """What is broken: in a file of the package, `old` made `new`, which a test of the file `test` must notice."""

    file: str
    old: str
    """Stands in the file exactly once."""
    new: str
    test: str
    """As pytest names it, from tests/faults/."""


VARIANTS: dict[str, tuple[Variant, ...]] = {
    "identity": (
        Variant(
            "lmjax/record/steps.py",
            "return saved_by is not None and run_of(",
            "return False and run_of(",
            "test_identity.py::test_a_checkpoint_of_another_run_is_refused",
        ),
        Variant(
            "lmjax/record/formats.py",
            "if type(found) is not int or not 1 <= found <= known:",
            "if type(found) is not int:",
            "test_identity.py::test_what_a_later_lmjax_wrote_is_refused_by_name",
        ),
        Variant(
            "lmjax/record/seal.py",
            "validated(Step, document, strict=True)",
            "pass",
            "test_identity.py::test_an_odd_manifest_is_damage_even_if_it_is_sealed",
        ),
        Variant(
            "lmjax/run/workdir.py",
            "if sealed is not None and sealed != identity(cfg) and not allow:",
            "if False and not allow:",
            "test_identity.py::test_checkpoints_alone_are_of_the_config_that_saved_them",
        ),
        Variant(
            "lmjax/run/run.py",
            "        check_meta(meta, step, self.task.frozen)\n",
            "",
            "test_identity.py::test_odd_notes_of_a_run_are_refused",
        ),
    ),
    "finished": (
        Variant(
            "lmjax/run/workdir.py",
            'for path in (workdir / "report.md", workdir / "loss.png"))',
            'for path in (workdir / "report.md",))',
            "test_finished.py::test_a_report_that_is_missing_is_made",
        ),
        Variant(
            "lmjax/run/run.py",
            " and has_report(workdir) and has_files(workdir, cfg):",
            " and has_report(workdir):",
            "test_side_files.py::test_a_finished_run_mends_its_tokenizer",
        ),
        Variant(
            "lmjax/run/workdir.py",
            "    return None if problems else step\n",
            "    return step\n",
            "test_finished.py::test_a_last_checkpoint_that_is_damaged_is_made_again",
        ),
        Variant(
            "lmjax/run/workdir.py",
            'if (workdir / _SEALED).exists() and steps.newest_sealed(workdir / "checkpoints") is None:',
            "if False:",
            "test_finished.py::test_without_any_checkpoint_it_never_starts_from_nothing",
        ),
        Variant(
            "lmjax/run/workdir.py",
            "    if int(newest.name) < step:\n",
            "    if False:\n",
            "test_finished.py::test_what_is_missing_of_the_end_is_made",
        ),
    ),
    "side files": (
        Variant(
            "lmjax/run/workdir.py",
            "        if _sealed_digest(workdir) is None:\n            raise\n",
            "        raise\n",
            "test_side_files.py::test_what_can_be_made_again_is",
        ),
        Variant(
            "lmjax/record/jsonl.py",
            "        if end < len(content):\n",
            "        if end > len(content):\n",
            "test_side_files.py::test_a_torn_line_is_told_and_its_step_read_again",
        ),
        Variant(
            "lmjax/run/workdir.py",
            "ValueError, KeyError, TypeError, OverflowError, RecursionError)",
            "KeyError)",
            "test_side_files.py::test_a_finished_run_mends_them_too",
        ),
        Variant(
            "lmjax/record/ledger.py",
            "    except TypeError:\n        return None\n",
            "    except TypeError:\n        raise\n",
            "test_side_files.py::test_records_that_are_damaged_are_told_and_added_to",
        ),
    ),
    "files": (
        Variant(
            "lmjax/data/store/mapped.py",
            "        if stamp == self._stamp:\n",
            "        if self._stamp is not None:\n",
            "test_files.py::test_a_shard_that_is_overwritten_is_checked_again",
        ),
        Variant(
            "lmjax/data/store/mapped.py",
            "        os.close(descriptor)\n",
            "        pass\n",
            "test_files.py::test_there_may_be_more_shards_than_file_descriptors",
        ),
        Variant(
            "lmjax/data/store/mapped.py",
            "        if found.st_size != self._size:\n",
            "        if False:\n",
            "test_files.py::test_a_shard_that_is_cut_off_is_named",
        ),
        Variant(
            "lmjax/data/store/manifest.py",
            "            if twice is not None:\n",
            "            if False:\n",
            "test_files.py::test_a_manifest_that_contradicts_itself_is_refused",
        ),
        Variant(
            "lmjax/data/store/dataset.py",
            "    if found := unlisted(located, manifest):\n",
            "    if found := []:\n",
            "test_files.py::test_a_shard_that_is_not_listed_is_refused",
        ),
        Variant(
            "lmjax/run/workdir.py",
            "and _has_same_data(workdir, cfg):",
            "and workdir:",
            "test_files.py::test_a_run_may_be_moved_with_its_data",
        ),
        Variant(
            "lmjax/data/prepare/prepare.py",
            "    records.check_unedited(recipe, directory, files)\n",
            "",
            "test_files.py::test_text_that_is_edited_while_it_is_read_is_noticed",
        ),
        Variant(
            "lmjax/data/prepare/records.py",
            'was["contents"] == contents(files):',
            "True:",
            "test_files.py::test_text_that_was_edited_in_place_is_noticed",
        ),
    ),
    "messages": (
        Variant(
            "lmjax/errors.py",
            '    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)\n',
            "    return text\n",
            "test_messages.py::test_terminal_escapes_in_names_of_files_are_visible",
        ),
        Variant(
            "lmjax/errors.py",
            "    if len(text) <= limit:\n",
            "    if len(text) > 0:\n",
            "test_messages.py::test_long_keys_and_values_make_short_messages",
        ),
        Variant(
            "lmjax/config.py",
            "        except BaseException as error:  # exit(0)",
            "        except Exception as error:  # exit(0)",
            "test_messages.py::test_a_config_file_that_exits_is_no_success[top-exit(0)]",
        ),
        Variant(
            "lmjax/process/ending.py",
            "        faults.check()\n",
            "",
            "test_messages.py::test_a_fault_that_could_not_happen_is_refused_at_once",
        ),
        Variant(
            "lmjax/config.py",
            '"{path}: {error}; {formats.origin(tree)}"',
            '"{error}"',
            "test_messages.py::test_a_saved_config_of_another_version_names_itself",
        ),
    ),
    "fuzz": (
        Variant(
            "lmjax/data/store/shards.py",
            "        if zlib.crc32(content.data) != self.checksums[block]:\n",
            "        if zlib.crc32(content.data[:1000]) == 0:\n",
            "test_fuzz.py::test_shards",
        ),
        Variant(
            "lmjax/record/seal.py",
            "if found[name] != listed[name])",
            "if found[name][1] != listed[name][1])",
            "test_fuzz.py::test_files_of_checkpoints",
        ),
        Variant(
            "lmjax/record/jsonl.py",
            "    except (ValueError, RecursionError):\n",
            "    except ValueError:\n",
            "test_fuzz.py::test_records_of_runs",
        ),
        Variant(
            "lmjax/data/tokenizers/load.py",
            "    except Exception as error:  # of a library",
            "    except KeyError as error:  # of a library",
            "test_fuzz.py::test_tokenizers",
        ),
        Variant(
            "lmjax/config.py",
            '    except (TypeError, ValueError, OverflowError) as error:\n        raise ConfigError(f"--config.{path}=',
            '    except TypeError as error:\n        raise ConfigError(f"--config.{path}=',
            "test_fuzz.py::test_overrides",
        ),
    ),
    "disk": (
        Variant(
            "lmjax/record/trees.py",
            "    _say_failures_once()\n    return v1",
            "    return v1",
            "test_disk.py::test_training_goes_on_where_there_is_room_again[600k-checkpoints/12]",
        ),
        Variant(
            "lmjax/record/files.py",
            "    if error.errno not in _FULL:\n",
            "    if error.errno in _FULL:\n",
            "test_disk.py::test_training_goes_on_where_there_is_room_again[8k-config.json]",
        ),
        Variant(
            "lmjax/record/checkpoint.py",
            "alone = group.processes() == 1",
            "alone = group.processes() == 0",
            "test_disk.py::test_training_goes_on_where_there_is_room_again[600k-checkpoints/12]",
        ),
        Variant(
            "lmjax/record/jsonl.py",
            'f"{error.strerror or error}{room(error, path, size)}"',
            'f"{error.strerror or error}"',
            "test_disk.py::test_training_goes_on_where_there_is_room_again[20k-metrics.jsonl]",
        ),
    ),
    "numbers": (
        Variant(
            "lmjax/train/loop.py",
            "self._left_out = [*self._left_out, (step, batch)] if",
            "self._left_out = [(step, batch)] if",
            "test_numbers.py::test_too_many_steps_that_are_not_finite_name_and_keep_their_batches",
        ),
        Variant(
            "lmjax/run/replay.py",
            "shard_batch(batch if found is None else found,",
            "shard_batch(batch,",
            "test_numbers.py::test_too_many_steps_that_are_not_finite_name_and_keep_their_batches",
        ),
        Variant(
            "lmjax/train/spikes.py",
            "(recent.seen >= _LEAST)",
            "(recent.seen >= 2)",
            "test_numbers.py::test_a_spike_is_left_out_and_a_restart_decides_the_same",
        ),
        Variant(
            "lmjax/train/step.py",
            "            taken &= ~spike\n",
            "",
            "test_numbers.py::test_a_spike_is_left_out_and_a_restart_decides_the_same",
        ),
        Variant(
            "lmjax/devices/replicas.py",
            "        if times < len(held):\n",
            "        if times < 0:\n",
            "test_numbers.py::test_a_bit_that_flips_in_one_copy_is_found_and_the_device_named",
        ),
        Variant(
            "lmjax/devices/replicas.py",
            "if digest != usual or not most]",
            "if digest == usual or not most]",
            "test_numbers.py::test_a_bit_that_flips_in_one_copy_is_found_and_the_device_named",
        ),
        Variant(
            "lmjax/train/pace.py",
            "if here > (seconds - usual) / 2:",
            "if here < (seconds - usual) / 2:",
            "test_numbers.py::test_a_step_that_takes_far_too_long_is_told",
        ),
    ),
    "scored": (
        Variant(
            "lmjax/data/store/shards.py",
            'np.packbits(weights > 0, bitorder="little")',
            'np.packbits(weights > 0, bitorder="big")',
            "../data/chat/test_prepare.py::test_what_is_stored_is_what_was_scored",
        ),
        Variant(
            "lmjax/data/store/manifest.py",
            "[(shard.tokens_hash, shard.scored_hash, shard.weights_hash) for",
            "[(shard.tokens_hash, shard.scored_hash) for",
            "../data/chat/test_prepare.py::test_weights_are_of_training_alone",
        ),
        Variant(
            "lmjax/data/packing.py",
            '"whole", weights_BU > 0)',
            '"whole", weights_BU)',
            "../data/chat/test_prepare.py::test_weights_are_of_training_alone",
        ),
        Variant(
            "lmjax/data/store/shards.py",
            "    if files.hash_bytes(content) != expected_hash:\n",
            "    if len(content) == 0:\n",
            "../data/chat/test_prepare.py::test_any_flipped_bit_is_found",
        ),
        Variant(
            "lmjax/data/chat/scoring.py",
            "if not (whole.startswith(closed) and closed.startswith(opened) and len(opened) < len(closed)):",
            "if not len(opened) < len(closed):",
            "../data/chat/test_scoring.py::test_what_cannot_be_scored_is_named",
        ),
    ),
    "templates": (
        Variant(
            "lmjax/data/chat/template_process.py",
            "jinja2.sandbox.ImmutableSandboxedEnvironment(",
            "jinja2.Environment(",
            "../data/chat/test_rendering.py::test_hostile_and_broken_templates_fail_in_one_line",
        ),
        Variant(
            "lmjax/data/chat/template_process.py",
            "signal.alarm(20 * seconds)",
            "signal.alarm(seconds)",
            "../data/chat/test_rendering.py::test_the_time_of_a_template_is_that_of_its_own_work",
        ),
        Variant(
            "lmjax/data/chat/template_process.py",
            "    if not clock:\n",
            "    if clock:\n",
            "../data/chat/test_rendering.py::test_a_template_knows_the_time",
        ),
        Variant(
            "lmjax/data/chat/template_process.py",
            'if "".join(pieces) != text or opened:',
            "if opened:",
            "../data/chat/test_scoring.py::test_what_cannot_be_scored_is_named",
        ),
    ),
    "rollback": (
        Variant(
            "lmjax/run/rollback.py",
            'meta["data"]["next_sample"] + rollback.skip}',
            'meta["data"]["next_sample"]}',
            "test_rollback.py::test_exactly_those_samples_are_left_out",
        ),
        Variant(
            "lmjax/record/ledger.py",
            " + skipped.get(before.step, 0):",
            ":",
            "test_rollback.py::test_exactly_those_samples_are_left_out",
        ),
        Variant(
            "lmjax/run/progress.py",
            'self._left_out = meta.get("left_out", [])',
            "self._left_out = []",
            "test_rollback.py::test_it_is_on_record_and_the_old_branch_is_kept",
        ),
        Variant(
            "lmjax/run/rollback.py",
            "    if rollback.step > step:\n",
            "    if rollback.step < 0:\n",
            "test_rollback.py::test_a_checkpoint_from_before_it_is_not_gone_on_from",
        ),
        Variant(
            "lmjax/run/rollback.py",
            "with lock(workdir, patience=0):",
            "if True:",
            "test_rollback.py::test_not_while_it_trains",
        ),
    ),
    "security": (
        Variant(
            "lmjax/process/start_up.py",
            "os.umask(0o077)",
            "os.umask(0o022)",
            "test_security.py::test_only_the_owner_reads_what_a_run_writes",
        ),
        Variant(
            "lmjax/record/files.py",
            "    if os.path.islink(draft):\n",
            "    if not draft.name:\n",
            "test_security.py::test_a_planted_link_is_not_followed[report.md.tmp]",
        ),
        Variant(
            "lmjax/config.py",
            "hide(dataclasses.asdict(cfg))",
            "dataclasses.asdict(cfg)",
            "test_security.py::test_a_secret_in_a_setting_is_written_nowhere",
        ),
        Variant(
            "lmjax/process/ending.py",
            "visible(hide(message))",
            "visible(message)",
            "test_security.py::test_a_secret_on_the_command_line_is_not_repeated",
        ),
        Variant(
            "lmjax/data/prepare/sources.py",
            "    if size > most:\n",
            "    if size > 9 * most:\n",
            "test_security.py::test_the_limit_is_one_of_documents",
        ),
        Variant(
            "lmjax/run/convert.py",
            "        if found != digest:\n",
            "        if not found:\n",
            "test_security.py::test_a_pinned_model_is_that_one_or_none",
        ),
    ),
    "processes": (
        Variant(
            "lmjax/record/lease.py",
            "        if not self._holds():\n",
            "        if not self._word:\n",
            "test_processes.py::test_who_was_given_up_writes_no_more",
        ),
        Variant(
            "lmjax/process/ending.py",
            "    if code == StallError.exit_code:\n",
            "    if code == DONE:\n",
            "test_processes.py::test_a_killed_process_is_named_with_the_last_good_step",
        ),
        Variant(
            "lmjax/process/lifeline.py",
            "    elif runs != program:\n",
            "    elif not runs:\n",
            "test_processes.py::test_another_version_at_one_process_is_noticed",
        ),
    ),
    "buckets": (
        Variant(
            "lmjax/record/buckets.py",
            "_TRIES = 10\n",
            "_TRIES = 1\n",
            "test_buckets.py::test_data_prepared_in_a_storm_are_those_of_the_disk",
        ),
        Variant(
            "lmjax/record/buckets.py",
            "    except FileNotFoundError:\n        return []\n",
            "    except FileNotFoundError:\n        raise\n",
            "test_buckets.py::test_data_prepared_in_a_storm_are_those_of_the_disk",
        ),
        Variant(
            "lmjax/record/buckets.py",
            "                raise StorageError(\n",
            "                raise OSError(\n",
            "test_buckets.py::test_a_store_that_does_not_answer_is_not_taken_for_an_empty_one[LMJAX_MANIFEST]",
        ),
        Variant(
            "lmjax/record/files.py",
            "return epath.Path(path) if is_remote(epath.Path(path)) else epath.Path(path).resolve()",
            "return epath.Path(path).resolve()",
            "test_buckets.py::test_a_run_in_a_bucket_killed_and_resumed_is_the_run_on_disk",
        ),
    ),
}
"""By the group of the tests."""

NEEDS = {"buckets": ("gcsfs", "gcp_storage_emulator")}
"""Packages without which the tests of a group are skipped, and say nothing of its variants."""


def main(groups: Sequence[str]) -> int:
    if unknown := set(groups) - VARIANTS.keys():
        print(f"there is no group {', '.join(sorted(unknown))}; there is {', '.join(VARIANTS)}")
        return 2
    caught = tried = 0
    for group in groups or VARIANTS:
        if missing := [name for name in NEEDS.get(group, ()) if importlib.util.find_spec(name) is None]:
            print(f"left out: {group}, which needs {', '.join(missing)}")
            continue
        first = VARIANTS[group][0]
        if is_noticed(first._replace(new=first.old)):
            print(f"{group}: {first.test} fails in a copy of the code in which nothing is broken", flush=True)
            return 1
        for variant in VARIANTS[group]:
            begin = time.monotonic()
            noticed, tried = is_noticed(variant), tried + 1
            caught += noticed
            said = "caught" if noticed else "MISSED"
            print(f"{said}  {time.monotonic() - begin:5.0f} s  {group}: {variant.test}  {variant.file}", flush=True)
    print(f"{caught} of {tried} variants caught: {100 * caught / max(1, tried):.0f}%")
    return int(caught < tried)


def is_noticed(variant: Variant) -> bool:
    """Whether the test fails where the code is broken: fails, not breaks down itself."""
    with tempfile.TemporaryDirectory(prefix="lmjax-variant-") as folder:
        for name in _COPIED:
            path, target = ROOT / name, Path(folder) / name
            _ = shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
        path = Path(folder) / variant.file
        path.write_text(broken(variant))
        command = [sys.executable, "-m", "pytest", "-n0", "-x", "-m", "", f"tests/faults/{variant.test}"]
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    if ended.returncode not in (0, 1):
        print(ended.stdout[-2000:] + ended.stderr[-2000:])
    return ended.returncode == 1 and " error" not in ended.stdout.splitlines()[-1]


def broken(variant: Variant) -> str:
    """The text of the file with what is broken in it."""
    text = (ROOT / variant.file).read_text()
    assert text.count(variant.old) == 1, f"{variant.file} has this {text.count(variant.old)} times: {variant.old}"
    return text.replace(variant.old, variant.new)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
