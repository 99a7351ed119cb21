"""Settings: where each is taken from, and what is said of a wrong one."""

from __future__ import annotations

from typing import Any

import pytest

from dagster_nanochat.launch.runpod.config import (
    CHECKPOINT_BYTES_PER_PARAMETER,
    RunPodSettings,
    SettingsError,
    disk_gb,
    resolve_settings,
    variable,
)
from nanochat.costs import checkpoint_bytes
from nanochat.recipes import Hardware, Recipe, named_recipes, parameters

H100 = "NVIDIA H100 80GB HBM3"
# A value of every field, as a config says it and as a variable does.
EVERY_FIELD: dict[str, tuple[Any, str]] = {
    "gpu_type_ids": ([H100, "NVIDIA H200"], f"{H100}, NVIDIA H200"),
    "gpu_count": (4, "4"),
    "nodes": (2, "2"),
    "cloud_type": ("ALL", "ALL"),
    "data_center_ids": (["US-KS-2"], "US-KS-2"),
    "min_memory_gib": (48.0, "48"),
    "min_ram_gib": (100.0, "100"),
    "min_cuda_version": ("12.8", "12.8"),
    "image_name": ("ghcr.io/me/mine:1", "ghcr.io/me/mine:1"),
    "container_disk_gb": (80, "80"),
    "volume_disk_gb": (20, "20"),
    "env_variables": ({"NCCL_DEBUG": "INFO"}, '{"NCCL_DEBUG": "INFO"}'),
    "max_price_usd_per_h": (30.5, "30.5"),
    "max_usd": (100.0, "100"),
    "deadline_h": (5.0, "5"),
}


def _environment(**fields: str) -> dict[str, str]:
    return {variable(name): text for name, text in fields.items()}


def test_every_field_can_be_said_in_every_layer() -> None:
    assert EVERY_FIELD.keys() == RunPodSettings.model_fields.keys()
    said = {name: value for name, (value, _) in EVERY_FIELD.items()}
    whole = RunPodSettings.model_validate(said)
    texts = _environment(**{name: text for name, (_, text) in EVERY_FIELD.items()})
    assert resolve_settings(environment=texts) == whole
    assert resolve_settings(environment={}, hardware=Hardware(runpod=said)) == whole
    assert resolve_settings(environment={}, run=said) == whole


def test_nothing_said_is_the_recipes_hardware() -> None:
    settings = resolve_settings(hardware=Hardware(gpus=8, min_gpu_memory_gib=80), environment={})
    assert settings == RunPodSettings(gpu_count=8, min_memory_gib=80)
    assert resolve_settings(environment={}) == RunPodSettings()


def test_a_later_layer_wins_field_by_field() -> None:
    settings = resolve_settings(
        hardware=Hardware(gpus=8, min_gpu_memory_gib=80, runpod={"max_usd": 20, "gpu_type_ids": [H100]}),
        environment=_environment(gpu_count="4", max_usd="10", cloud_type="ALL", nodes="1"),
        run={"max_usd": 30, "gpu_count": None},
    )
    assert settings == RunPodSettings(
        gpu_count=4, min_memory_gib=80, cloud_type="ALL", gpu_type_ids=(H100,), max_usd=30
    )


def test_variables_of_all_layers_are_put_together_and_the_later_wins() -> None:
    settings = resolve_settings(
        environment=_environment(env_variables='{"A": "1", "B": "1"}'),
        hardware=Hardware(runpod={"env_variables": {"B": "2", "C": "2"}}),
        run={"env_variables": {"C": "3"}},
    )
    assert settings.env_variables == {"A": "1", "B": "2", "C": "3"}


def test_one_gpu_type_may_be_said_in_the_singular() -> None:
    expected = RunPodSettings(gpu_type_ids=(H100,))
    assert resolve_settings(environment={"NANOCHAT_RUNPOD_GPU_TYPE_ID": H100}) == expected
    assert resolve_settings(environment={}, run={"gpu_type_id": H100}) == expected
    over = resolve_settings(environment=_environment(gpu_type_ids="NVIDIA L4"), run={"gpu_type_id": H100})
    assert over == expected
    with pytest.raises(SettingsError, match="two ways to say one thing"):
        resolve_settings(environment={}, run={"gpu_type_id": H100, "gpu_type_ids": [H100]})


def test_an_empty_variable_says_nothing() -> None:
    assert resolve_settings(environment=_environment(gpu_count="", max_usd=" ")) == RunPodSettings()


WRONG: list[tuple[str, Any, str]] = [
    ("gpu_count", 0, "1 or more"),
    ("gpu_count", "eight", "1 or more"),
    ("nodes", 0, "Machines: 1, or more"),
    ("cloud_type", "COMUNITY", "SECURE"),
    ("min_memory_gib", -1, "above 0 GiB"),
    ("min_cuda_version", "12", "as in 12.8"),
    ("container_disk_gb", 0, "1 GB or more"),
    ("volume_disk_gb", 5, "10 GB or more"),
    ("max_price_usd_per_h", 0, "above 0 USD"),
    ("max_usd", "nan", "above 0 USD"),
    ("deadline_h", "inf", "above 0 hours"),
    ("gpu_type_ids", [""], "such as 'NVIDIA H100 80GB HBM3'"),
    ("env_variables", "A=b", "JSON object"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), WRONG)
def test_a_wrong_value_is_named_with_its_layer_and_what_is_allowed(
    name: str, value: Any, allowed: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve_settings(environment={}, hardware=Hardware(runpod={name: value}))
    for part in ("the recipe", name, allowed):
        assert part in str(caught.value)
    if isinstance(value, list):
        return
    with pytest.raises(SettingsError) as caught:
        resolve_settings(environment=_environment(**{name: str(value)}))
    for part in ("the environment", variable(name), allowed):
        assert part in str(caught.value)


def test_a_setting_that_there_is_not_is_named_with_the_nearest() -> None:
    with pytest.raises(
        SettingsError, match=r"run's config: gpu_counts is no setting; did you mean gpu_count\?"
    ):
        resolve_settings(environment={}, run={"gpu_counts": 1})
    with pytest.raises(SettingsError, match=r"NANOCHAT_RUNPOD_MAX_UDS .*NANOCHAT_RUNPOD_MAX_USD"):
        resolve_settings(environment={"NANOCHAT_RUNPOD_MAX_UDS": "1"})
    with pytest.raises(SettingsError, match="did you mean NANOCHAT_RUNPOD_MAX_PRICE_USD_PER_H"):
        resolve_settings(environment={"NANOCHAT_RUNPOD_MAX_PRICE": "1"})
    assert resolve_settings(environment={"NANOCHAT_RUNPOD_SPEC": "/a/file"}) == RunPodSettings()
    with pytest.raises(SettingsError, match="there are gpu_type_ids, gpu_count"):
        resolve_settings(environment={}, hardware=Hardware(runpod={"zzz": 1}))


def test_a_variables_value_is_never_shown() -> None:
    for said in ({"env_variables": {"A": "secret-1", "B": 2}}, {"env_variables": '{"A": "secret-1"'}):
        with pytest.raises(SettingsError) as caught:
            resolve_settings(environment={}, run=said)
        assert "env_variables" in str(caught.value)
        assert "secret-1" not in str(caught.value)
    assert "secret-1" not in repr(RunPodSettings(env_variables={"A": "secret-1"}))


def test_rules_between_fields_hold_across_layers() -> None:
    with pytest.raises(SettingsError, match=r"all layers together: .*SECURE"):
        resolve_settings(environment=_environment(cloud_type="COMMUNITY"), run={"nodes": 2})
    with pytest.raises(SettingsError, match="RUNPOD_API_KEY"):
        resolve_settings(environment={}, run={"env_variables": {"RUNPOD_API_KEY": "k"}})


def test_clouds_are_those_to_ask() -> None:
    assert RunPodSettings().clouds == ("SECURE",)
    assert RunPodSettings(cloud_type="ALL").clouds == ("SECURE", "COMMUNITY")
    assert RunPodSettings(cloud_type="ALL", nodes=2).clouds == ("SECURE",)


def test_the_disk_holds_image_shards_and_one_checkpoint_more_than_are_kept() -> None:
    gb = 1_000_000_000
    assert disk_gb(0, 0, image_bytes=10 * gb) == 12
    assert disk_gb(10 * gb, 0, image_bytes=10 * gb) == 24
    assert disk_gb(0, gb, checkpoints_kept=2, image_bytes=0) == 44  # 3 x 12 GB and a fifth, rounded up


@pytest.mark.parametrize("recipe", named_recipes().values(), ids=lambda recipe: recipe.name)
def test_a_checkpoint_is_no_larger_than_the_disk_allows_for(recipe: Recipe) -> None:
    model, vocab = recipe.model, recipe.tokenizer.vocab_size
    assert CHECKPOINT_BYTES_PER_PARAMETER * parameters(model, vocab) >= checkpoint_bytes(model, vocab)
