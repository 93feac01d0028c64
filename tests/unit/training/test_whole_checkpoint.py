"""Which checkpoint takes the place of a damaged one, and what is noticed of a single file."""

import os
import warnings

import pytest
import torch
from safetensors.torch import load_file

from eetrain.errors import CheckpointError, ConfigError
from eetrain.training.atomic_io import AtomicCheckpointIO
from eetrain.training.checkpoint_fallback import newest_checkpoint, whole_checkpoint
from eetrain.training.checkpoint_folder import save_folder
from eetrain.training.checkpoint_reading import check_checkpoint, read_checkpoint, read_trainer_state


def save_file(path, step):
    AtomicCheckpointIO().save_checkpoint({"global_step": step, "state_dict": {"w": torch.full((40,), step)}}, path)


def save_tree(path, step):
    save_folder(path, {"w": torch.full((40,), step)}, {"global_step": step}, topology={"stages": 1})


FORMS = {"file": save_file, "folder": save_tree}


def flip(path):
    """Change one bit of the weights."""
    path = next(path.glob("weights*")) if path.is_dir() else path
    data = bytearray(path.read_bytes())
    place = data.rindex(torch.full((40,), data_step(path)).numpy().tobytes()) + 17
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


def data_step(path):
    tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)["state_dict"]
    return int(tensors["w"][0])


def cut(path):
    """Lose the end of what names the step."""
    path = path / "manifest.json" if path.is_dir() else path
    path.write_bytes(path.read_bytes()[:-30])


@pytest.fixture(params=FORMS)
def folder(request, tmp_path):
    """Steps 2, 4 and 10, and last at 12; neither names nor times of writing tell the order."""
    for name, step in (("c", 10), ("a", 4), ("b", 2), ("last", 12)):
        FORMS[request.param](tmp_path / f"{name}.ckpt", step)
    for age, name in enumerate(("b", "a", "c", "last")):
        os.utime(tmp_path / f"{name}.ckpt", (1000 - age, 1000 - age))
    return tmp_path


def found(path):
    """The name of what is read for ``path``, and the warnings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        whole = whole_checkpoint(path)
    return whole.name, [str(warning.message) for warning in said]


def test_a_whole_one_is_taken_without_a_word(folder):
    assert found(folder / "last.ckpt") == ("last.ckpt", [])
    assert found(str(folder / "a.ckpt")) == ("a.ckpt", [])


def test_the_newest_whole_one_by_its_stored_step(folder):
    flip(folder / "last.ckpt")
    name, (said,) = found(folder / "last.ckpt")
    assert name == "c.ckpt"
    assert said.startswith(f"{folder}/last.ckpt is damaged: ")
    assert said.endswith(f"Going on from {folder}/c.ckpt at step 10 instead; 2 steps are lost.")
    flip(folder / "c.ckpt")
    name, (said,) = found(folder / "last.ckpt")
    assert name == "a.ckpt"
    assert said.endswith("a.ckpt at step 4 instead; 8 steps are lost.")


def test_later_ones_are_passed_over(folder):
    flip(folder / "a.ckpt")
    assert found(folder / "a.ckpt")[0] == "b.ckpt"


def test_of_an_unreadable_one_the_loss_is_not_known(folder):
    cut(folder / "a.ckpt")
    name, (said,) = found(folder / "a.ckpt")
    assert name == "last.ckpt"
    assert said.endswith("last.ckpt at step 12 instead; an unknown number of steps are lost.")


def test_a_damaged_file_and_a_whole_folder(tmp_path):
    save_file(tmp_path / "last.ckpt", 4)
    save_tree(tmp_path / "step=2.ckpt", 2)
    cut(tmp_path / "last.ckpt")
    assert found(tmp_path / "last.ckpt")[0] == "step=2.ckpt"


def test_none_is_whole(folder):
    for path in folder.glob("*.ckpt"):
        flip(path)
    torch.save({"weights": 1}, folder / "without a step.ckpt")
    (folder / "link.ckpt").symlink_to("gone")
    with pytest.raises(CheckpointError) as caught:
        whole_checkpoint(folder / "last.ckpt")
    assert caught.value.message.startswith(f"{folder}/last.ckpt is damaged: ")
    assert caught.value.message.endswith(f"No other checkpoint in {folder} is whole.")


def test_there_is_nothing(tmp_path):
    save_file(tmp_path / "other.ckpt", 3)
    for call in (whole_checkpoint, check_checkpoint, read_checkpoint, read_trainer_state):
        with pytest.raises(FileNotFoundError, match=r"gone\.ckpt"):
            call(tmp_path / "gone.ckpt")


def set_aside(path):
    path.rename(path.with_name(f".{path.name}.old"))


def test_what_a_kill_left_aside_is_found(folder):
    set_aside(folder / "last.ckpt")
    assert found(folder / "last.ckpt") == (".last.ckpt.old", [])
    assert read_trainer_state(folder / "last.ckpt")["global_step"] == 12
    assert set(read_checkpoint(folder / "last.ckpt")["state_dict"]) == {"w"}
    assert AtomicCheckpointIO().load_checkpoint(folder / "last.ckpt")["state_dict"]["w"][0] == 12
    set_aside(folder / "c.ckpt")
    flip(folder / ".last.ckpt.old")
    assert found(folder / "last.ckpt")[0] == ".c.ckpt.old"


def test_the_newest_checkpoint_has_most_steps(folder):
    assert newest_checkpoint(folder) == folder / "last.ckpt"
    set_aside(folder / "last.ckpt")
    assert newest_checkpoint(str(folder)) == folder / ".last.ckpt.old"
    flip(folder / ".last.ckpt.old")
    assert newest_checkpoint(folder) == folder / ".last.ckpt.old", "whole_checkpoint is to say what is wrong with it"
    AtomicCheckpointIO().remove_checkpoint(folder / "last.ckpt")
    assert newest_checkpoint(folder) == folder / "c.ckpt"
    for path in folder.glob("*.ckpt"):
        AtomicCheckpointIO().remove_checkpoint(path)
    assert newest_checkpoint(folder) is None
    assert newest_checkpoint(folder / "gone") is None


def test_no_change_of_a_single_file_passes_for_other_contents(tmp_path):
    path = tmp_path / "last.ckpt"
    save_file(path, 5)
    whole, noticed = path.read_bytes(), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            stored = read_checkpoint(path)
        except CheckpointError:
            noticed += 1
        else:  # the change is in padding or in a date
            assert stored["global_step"] == 5
            assert stored["state_dict"]["w"].tolist() == [5] * 40
    assert noticed > 1000
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"last\.ckpt cannot be read: .* HINT: It is cut short"):
            read_checkpoint(path)


def test_reading_notices_what_torch_does_not(folder):
    flip(folder / "a.ckpt")
    for call in (check_checkpoint, read_checkpoint, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(CheckpointError, match=r"a\.ckpt is damaged: .* is not what was written"):
            call(folder / "a.ckpt")
    assert read_trainer_state(folder / "a.ckpt")["global_step"] == 4


def test_only_resuming_replaces_and_only_resuming_refuses_folders(folder):
    damaged, resuming = folder / "last.ckpt", AtomicCheckpointIO(resuming=True)
    is_folder = damaged.is_dir()
    flip(damaged)
    with pytest.raises(CheckpointError, match="is damaged"):
        AtomicCheckpointIO().load_checkpoint(damaged)
    if not is_folder:
        with pytest.warns(UserWarning, match="2 steps are lost"):
            assert resuming.load_checkpoint(damaged)["global_step"] == 10
        return
    assert AtomicCheckpointIO().load_checkpoint(folder / "c.ckpt")["global_step"] == 10
    with pytest.raises(ConfigError) as caught:
        resuming.load_checkpoint(damaged)
    assert caught.value.message.startswith(
        f"{damaged} is a checkpoint folder, whose optimizer the strategy of this run"
    )
    assert "--trainer.strategy.init_args.stages 1" in caught.value.hint
    with pytest.warns(UserWarning, match="2 steps are lost"):
        assert resuming.locate(damaged) == folder / "c.ckpt"


def test_a_folder_in_the_place_of_a_damaged_file_is_refused_too(tmp_path):
    save_file(tmp_path / "last.ckpt", 4)
    save_tree(tmp_path / "step=2.ckpt", 2)
    cut(tmp_path / "last.ckpt")
    with (
        pytest.warns(UserWarning, match="Going on from"),
        pytest.raises(ConfigError, match=r"step=2\.ckpt is a checkpoint folder"),
    ):
        AtomicCheckpointIO(resuming=True).load_checkpoint(tmp_path / "last.ckpt")
