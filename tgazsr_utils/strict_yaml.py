"""YAML as profiles and ``-p`` have it."""

from typing import Any

import yaml

YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)  # of a number or date that is none; of deep nesting


class _EachNameOnce(yaml.SafeLoader):
    """YAML in which a name that a mapping has twice is an error, where PyYAML takes the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise yaml.YAMLError(f"the name {twice!r} is there twice")
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    return _EachNameOnce(text).get_single_data()
