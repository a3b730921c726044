"""The JSON settings beside others' weights: absent, broken, incomplete."""

import pytest

from taca_jax.errors import UserError
from taca_jax.formats.settings import read_settings


def test_missing_and_broken_settings(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is not there"):
        read_settings(tmp_path)
    (tmp_path / "config.json").write_text("{]")
    with pytest.raises(UserError, match="is not JSON"):
        read_settings(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no field in_channels"):
        read_settings(tmp_path)["in_channels"]
