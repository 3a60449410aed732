"""Image sets as people have them on disk: archives one level off, damaged copies, links, names of any kind.

What ``list`` says and what loading does must agree, and each line must be true.
"""

import pytest
import torch
from miniatures import WRITERS, without_checksums
from test_reading import put

from tgazsr_utils.datasets import torchvision_sets
from tgazsr_utils.datasets.__main__ import fetch_set, list_sets
from tgazsr_utils.datasets.layouts import existing_root, list_datasets
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.datasets.published_sets import DATASETS

BY_NAME = ("tinyImageNet", "ImageNet")  # of any other name they are sets of one's own


@pytest.fixture(autouse=True)
def any_contents(monkeypatch):
    without_checksums(monkeypatch.setattr)
    torchvision_sets.reader.cache_clear()


def move(root, name, *to):
    """Moves the folder ``name`` in ``root``, perhaps to below itself; to ``root``: what it holds."""
    aside, to = (root / name).rename(root / "aside"), root.joinpath(*to)
    if to == root:
        for path in aside.iterdir():
            path.rename(root / path.name)
        aside.rmdir()
    else:
        to.parent.mkdir(exist_ok=True)
        aside.rename(to)
    return root


MOVES = {
    "inside itself": lambda root, name: move(root, name, name, name),
    "in a wrapper": lambda root, name: move(root, name, "all", name),
    "in a wrapper beside others": lambda root, name: move(put(root / "x" / "a.png") or root, name, "all", name),
    "without its folder": lambda root, name: move(root, name),
    "its folder as the root": lambda root, name: root / name,
    "in another writing": lambda root, name: move(root, name, name.upper().replace("-", "_")),
}


@pytest.mark.parametrize("how", MOVES)
@pytest.mark.parametrize("key", WRITERS)
def test_a_set_one_level_off_is_read_as_in_its_published_place(key, how, tmp_path):
    WRITERS[key](tmp_path)
    published = load_dataset(key, "test", tmp_path)
    root = MOVES[how](tmp_path, DATASETS[key].folder)
    torchvision_sets.reader.cache_clear()
    sets, problems = list_sets(existing_root(root), [key])
    if key in BY_NAME and how == "without its folder":
        assert sets.there[key] == "no" and key not in list_datasets(root)
        with pytest.raises(ValueError, match="not there"):
            load_dataset(key, "test", root)
        return
    data = load_dataset(key, "test", root)
    assert sets.there[key] == "yes" and not problems
    assert torch.equal(data.labels, published.labels) and torch.equal(data.images, published.images)
    assert data.prompts == published.prompts
    assert key in list_datasets(root) and not {"all", "aside", "images", "val"} & {*list_datasets(root)}
    assert fetch_set(key, existing_root(root)) == "there already"
