"""YAML as profiles and ``-p`` have it: its numbers are decimal, and a mapping has each name once."""

import re
from typing import Any

import yaml

YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)  # of a number or date that is none; of deep nesting
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """PyYAML reads 010 as 8, 1:40 as 100 and 1e-3 as text, and takes the last of two equal names."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise yaml.YAMLError(f"the name {twice!r} is there twice")
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: Any) -> int:
        return int(self.construct_scalar(node))


_DIGITS = list("-+.0123456789")
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?\d+(_\d+)*$", re.ASCII), _DIGITS)
_NUMBER = r"[-+]?((\d+(_\d+)*\.?\d*|\.\d+)(e[-+]?\d+)?|\.inf)$|\.nan$"
_Loader.add_implicit_resolver(_FLOAT, re.compile(_NUMBER, re.ASCII | re.IGNORECASE), _DIGITS)
_Loader.add_constructor(_INT, _Loader.construct_decimal)


def load_yaml(text: str) -> Any:
    return _Loader(text).get_single_data()
