"""What a run would take of GPUs that are not here, and how far that is from what was measured."""

import dataclasses
import json
import math

import pytest
import torch
from support import load_script

from sophia_train.config import compose, run_config
from sophia_train.errors import ConfigError
from sophia_train.memory import estimate_memory, plan_micro_batch
from sophia_train.models.gpt2 import GPT2
from sophia_train.planning import Cluster, make_plan
from sophia_train.planning.cluster import CARDS, LINK_EFFICIENCY
from sophia_train.planning.measured import Point, calibrating, errors, load_points, mfu_of, used_points
from sophia_train.planning.planned_run import planned_run
from sophia_train.planning.step_time import communication, step_time
from sophia_train.throughput import PEAK_FLOPS

SCRIPT = load_script("plan")
RUN = "optimizer=adamw"
POINTS = [
    Point("H200", 1, f"{RUN} model={model} batch_size={size} micro_batch_size={size}", speed, "", "", "")
    for model, size, speed in (("gpt2_125m", 64, 585_200), ("gpt2_355m", 32, 222_500))
]
EIGHT = ["batch_size=512", "hessian.batch_size=64"]
ISSUE = ["gpus=64", "gpu=A100", "gpus_per_node=8", "network=200", "model=gpt2_1_5b", "parallel=fsdp", *EIGHT]


def config_of(*overrides):
    return run_config(compose(overrides))


def plan_of(cluster, *overrides, points=None):
    return make_plan(config_of(*overrides), cluster, points)


def empty_model(config):
    with torch.device("meta"):
        return GPT2(config.model)


def point(tokens_per_second=1.0, **changes):
    return dataclasses.replace(POINTS[0], tokens_per_second=tokens_per_second, **changes)


class TestWork:
    @pytest.mark.parametrize(("parallel", "shards"), [("ddp", 1), ("fsdp", 16), ("hsdp", 8)])
    def test_memory_is_estimated_as_for_the_run_itself(self, parallel, shards):
        cluster, config = Cluster.of("A100", 16), config_of("model=gpt2_355m", f"parallel={parallel}", *EIGHT)
        plan, model = make_plan(config, cluster), empty_model(config)
        size = plan_micro_batch(model, 512 // 16, True, cluster.card.memory, shards)
        estimate = estimate_memory(model, size, True, shards)
        assert plan["run"]["shards"] == shards and plan["run"]["micro_batch_size"] == size
        expected = dataclasses.asdict(estimate) | {"total": estimate.total, "card": cluster.card.memory}
        assert plan["memory_bytes"] == expected

    def test_the_hessian_costs_what_its_estimator_says(self):
        seconds = {
            name: plan_of(Cluster.of("H200", 1), f"optimizer={name}")["step_seconds"]
            for name in ("adamw", "sophia_g", "sophia_h", "sophia_lite")
        }
        compute = seconds["adamw"]["compute"]
        assert seconds["adamw"]["hessian"] == seconds["sophia_lite"]["hessian"] == 0
        assert seconds["sophia_g"]["hessian"] == pytest.approx(compute * 32 / 480 / 10)
        assert seconds["sophia_h"]["hessian"] == pytest.approx(2 * compute * 32 / 480 / 10)

    def test_an_update_is_bytes_over_bandwidth(self):
        parameters = sum(p.numel() for p in empty_model(config_of()).parameters())
        for name, moved in {"adamw": 28, "sophia_g": 24}.items():
            seconds = plan_of(Cluster.of("H200", 1), f"optimizer={name}")["step_seconds"]
            assert seconds["optimizer"] == pytest.approx(moved * parameters / 4.2e12)

    def test_each_optimizer_of_a_mixed_one_moves_its_own(self):
        config = config_of("optimizer=sophia_robust")
        run, model = planned_run(config, Cluster.of("H200", 1)), empty_model(config)
        embeddings = model.transformer.wte.weight.numel() + model.transformer.wpe.weight.numel()
        assert run.optimizer_bytes == 24 * run.work.parameters + 4 * embeddings

    def test_what_would_fit_does(self):
        cluster = Cluster.of("A100-40GB", 8)
        for overrides in (
            ["model=gpt2_355m", "micro_batch_size=60"],
            ["model=gpt2_770m", "model.block_size=32768"],
            ["model=gpt2_1_5b", "model.n_layer=60"],
            ["model=gpt2_1_5b", "model.n_layer=60", "model.block_size=32768", "micro_batch_size=2"],
        ):
            verdict = plan_of(cluster, *overrides)["fits"]
            found = verdict.partition("; ")[2].removesuffix(" would").split()
            assert found, verdict
            assert plan_of(cluster, *overrides, *found)["fits"] == "fits"

    def test_where_nothing_would_fit_that_is_said(self):
        verdict = plan_of(Cluster.of("A100-40GB", 1), "model=gpt2_1_5b", "model.n_layer=200")["fits"]
        assert verdict.startswith("does not fit; take larger cards")


class TestStepTime:
    def test_ddp_by_hand(self):
        """Two nodes of 8: a ring of all has the adapters of 8, and only the last of 2 passes hides it.

        It is so long that it makes no difference which part of it is hidden.
        """
        cluster = Cluster.of("H100", 16, network=10)
        run = planned_run(config_of("batch_size=64", "micro_batch_size=2", "optimizer=adamw"), cluster)
        n = run.work.parameters
        reduce = 2 * 15 / 16 * 4 * n / (0.8 * 8 * 10e9 / 8)
        flops = 64 * 1024 * (6 * (n - 1024 * 768) + 12 * 12 * 768 * 1024)
        compute = flops / (16 * 989e12 * 0.5)
        time = step_time(run, 0.5)
        assert time.compute == pytest.approx(compute)
        assert time.communication == pytest.approx(reduce)
        assert time.exposed_communication == pytest.approx(reduce - compute / 2 * 2 / 3)
        assert time.total == pytest.approx(compute + reduce - compute / 3 + 28 * n / 3.35e12)

    def test_fsdp_by_hand(self):
        """One node of 4 with slow links, longer than passes, of which each sends its gradient in bf16."""
        cluster = dataclasses.replace(
            Cluster.of("A100", 4), card=dataclasses.replace(CARDS["A100"], nvlink=20e9)
        )
        overrides = ["batch_size=8", "micro_batch_size=1", "hessian.batch_size=4", "parallel=fsdp"]
        run = planned_run(config_of(*overrides, "gradient_type=bf16"), cluster)
        n = run.work.parameters
        gather = 3 / 4 * 2 * n / (0.8 * 20e9)  # and as long for the gradient, of 2 bytes, too
        time = step_time(run, 0.5)
        forward = time.compute / 2 / 3
        assert gather > 2 * forward
        assert time.communication == pytest.approx(4 * gather)
        assert time.exposed_communication == pytest.approx(4 * gather - 5 * forward)
        assert time.optimizer == pytest.approx(24 * n / 4 / 2.0e12)
        assert time.hessian == pytest.approx(time.compute * 4 / 8 / 10)

    @pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
    def test_only_the_embeddings_are_exposed_where_passes_are_long(self, parallel):
        time = step_time(planned_run(config_of(f"parallel={parallel}"), Cluster.of("H200", 2)), 0.5)
        model = empty_model(config_of())
        parameters = sum(p.numel() for p in model.parameters())
        embeddings = model.transformer.wte.weight.numel() + model.transformer.wpe.weight.numel()
        assert time.exposed_communication == pytest.approx(embeddings / parameters * time.communication)

    def test_hsdp_shares_by_nvlink_and_averages_by_the_network(self):
        run = planned_run(config_of("parallel=hsdp"), Cluster.of("H100", 32, network=100))
        n, nvlink, network = run.work.parameters, LINK_EFFICIENCY * 450e9, LINK_EFFICIENCY * 12.5e9
        links = communication(run)
        assert links.gather == pytest.approx(7 / 8 * 2 * n / nvlink)
        assert links.reduce == pytest.approx(7 / 8 * 4 * n / nvlink + 2 * 3 / 4 * 4 * n / 8 / network)

    def test_groups_of_half_a_node_have_half_its_adapters(self):
        run = planned_run(
            config_of("parallel=hsdp", "shard_processes=4"), Cluster.of("H100", 16, network=100)
        )
        n, links = run.work.parameters, communication(run)
        assert links.gather == pytest.approx(3 / 4 * 2 * n / (0.8 * 450e9))
        across = 2 * 3 / 4 * 4 * n / 4 / (0.8 * 2 * 12.5e9)
        assert links.reduce == pytest.approx(3 / 4 * 4 * n / (0.8 * 450e9) + across)

    def test_recomputed_blocks_make_a_third_more(self):
        once, again = (
            plan_of(Cluster.of("H200", 1), f"activation_checkpointing={value}")
            for value in ("none", "blocks")
        )
        ratio = again["step_seconds"]["compute"] / once["step_seconds"]["compute"]
        assert ratio == pytest.approx(4 / 3) and again["mfu"] < once["mfu"]

    def test_gradients_in_bf16_are_half_as_long(self):
        seconds = [
            plan_of(Cluster.of("A100", 16), f"gradient_type={each}")["communication_seconds"]
            for each in ("fp32", "bf16")
        ]
        assert seconds[0] == pytest.approx(2 * seconds[1])

    @pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
    @pytest.mark.parametrize("card", CARDS)
    def test_more_gpus_make_more_tokens(self, parallel, card):
        """The same batch in a node; and a batch that grows with the nodes, whose adapters are NVIDIA's."""
        overrides = [f"parallel={parallel}", "model=gpt2_355m"]
        within = [
            plan_of(Cluster.of(card, gpus), *overrides, *EIGHT)["tokens_per_second"] for gpus in (2, 4, 8)
        ]
        across = [
            plan_of(
                Cluster.of(card, gpus), *overrides, f"batch_size={32 * gpus}", f"hessian.batch_size={gpus}"
            )["tokens_per_second"]
            for gpus in (8, 16, 32, 64)
        ]
        assert within == sorted(within) and across == sorted(across)

    @pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
    def test_the_share_of_communication_grows_with_gpus_and_one_has_none(self, parallel):
        shares = []
        for gpus in (1, 2, 4, 8, 16, 32, 64):
            mode = parallel if gpus > 1 else "ddp"
            size = "micro_batch_size=8"
            shares.append(plan_of(Cluster.of("A100", gpus, 8, 5), f"parallel={mode}", size, *EIGHT))
        exposed = [plan["communication_share"] for plan in shares]
        assert exposed == sorted(exposed) and exposed[-1] > 0.1
        assert exposed[0] == shares[0]["communication_seconds"] == 0

    def test_the_parts_add_up(self):
        plan = plan_of(Cluster.of("A100", 64), "model=gpt2_1_5b", "parallel=fsdp", *EIGHT)
        seconds = dict(plan["step_seconds"])
        total = seconds.pop("total")
        assert math.fsum(seconds.values()) == pytest.approx(total)
        assert plan["tokens_per_second"] == pytest.approx(512 * 1024 / total)
        assert plan["days"] == pytest.approx(100_000 * total / 86400)
        assert plan["gpu_hours"] == pytest.approx(plan["days"] * 24 * 64)
        assert plan["communication_share"] == pytest.approx(seconds["communication"] / total)
        flops = empty_model(config_of("model=gpt2_1_5b")).flops_per_token() * plan["tokens_per_second"]
        assert plan["mfu"] == pytest.approx(flops / (64 * PEAK_FLOPS["A100"]))


class TestMeasured:
    def test_points_are_reproduced_and_left_out_by_their_neighbour(self):
        small, large = sorted(POINTS, key=lambda each: each.planned.work.parameters)[:2]
        found = errors([small, large])
        assert [error for error, _ in found] == pytest.approx([0, 0], abs=1e-12)
        predicted = [small.predicted(large.mfu), large.predicted(small.mfu)]
        left_out = [
            tokens / each.tokens_per_second - 1
            for tokens, each in zip(predicted, (small, large), strict=True)
        ]
        assert [each for _, each in found] == pytest.approx(left_out)
        assert errors([small])[0][1] is None

    def test_the_mfu_of_a_point_is_flops_over_peak(self):
        model = empty_model(config_of("model=gpt2_125m"))
        tokens, update = 64 * 1024, 28 * sum(p.numel() for p in model.parameters()) / 4.2e12
        expected = model.flops_per_token() * tokens / PEAK_FLOPS["H200"] / (tokens / 5e5 - update)
        assert point(5e5).mfu == pytest.approx(expected)

    @pytest.mark.parametrize("run", ["optimizer=sophia_g", "optimizer=adamw", "optimizer=sophia_h"])
    def test_optimizer_and_hessian_are_taken_off_whole_steps(self, run):
        whole = point(run=run)
        assert point(whole.predicted(0.4), run=run).mfu == pytest.approx(0.4)

    def test_points_of_several_gpus_check_and_do_not_calibrate(self):
        both = "model=gpt2_125m batch_size=128 micro_batch_size=64"
        points = [*POINTS, point(1.5 * POINTS[0].tokens_per_second, gpus=2, run=both)]
        assert calibrating(points, CARDS["H200"]) == POINTS
        error, left_out = errors(points)[-1]
        assert error == left_out and 0.2 < error < 1 / 3

    def test_between_two_sizes_by_the_logarithm_and_beyond_as_the_nearest(self):
        small, large = sorted(POINTS, key=lambda each: each.planned.work.parameters)[:2]
        n, m = (each.planned.work.parameters for each in (small, large))
        assert mfu_of([small, large], round(math.sqrt(n * m))) == pytest.approx((small.mfu + large.mfu) / 2)
        assert mfu_of([small, large], n // 10) == small.mfu and used_points(POINTS, n // 10) == [small]
        assert mfu_of([small, large], m * 10) == large.mfu and used_points([small, large], m * 10) == [large]
        assert used_points([small, large], n + 1) == [small, large]
        assert used_points([small, large], n) == [small]

    def test_points_of_one_size_count_as_their_mean(self):
        points = [point(4e5), point(6e5)]
        mean = (points[0].mfu + points[1].mfu) / 2
        assert mfu_of(points, 1) == pytest.approx(mean)
        assert [error for error, _ in errors(points)] == pytest.approx(
            [points[0].predicted(mean) / 4e5 - 1, points[1].predicted(mean) / 6e5 - 1]
        )

    def test_a_card_has_its_own_points_if_there_are(self):
        other = point(3e5, gpu="A100")
        assert calibrating([*POINTS, other], CARDS["A100"]) == [other]
        assert calibrating([*POINTS, other], CARDS["H200"]) == POINTS

    def test_each_point_of_ours_says_where_it_is_from(self):
        for each in load_points():
            assert each.provenance and each.command.startswith("python scripts/benchmark.py ")
            assert 0.1 < each.mfu < 0.8 or each.gpus > 1


class TestNotes:
    def test_nothing_is_beyond_a_measured_point(self):
        size = ["batch_size=64", "micro_batch_size=64"]
        notes = plan_of(Cluster.of("H200", 1), *size, points=POINTS)["notes"]
        assert [note.partition(" ")[0] for note in notes] == ["points"]  # how far they are off

    @pytest.mark.parametrize(
        ("gpu", "gpus", "override", "words"),
        [
            ("A100", 1, "seed=1", "no point is of the A100: it is given the MFU of the H200"),
            ("H200", 1, "model=gpt2_30m", "as small as 30M: it is given the MFU of 124M"),
            ("H200", 1, "model=gpt2_1_5b", "as large as 1.56B: it is given the MFU of 355M"),
            ("H200", 1, "micro_batch_size=2", "micro-batches of 2 are much smaller than those measured (64)"),
            ("H200", 1, "activation_checkpointing=blocks", "a third more FLOPs"),
            ("H200", 2, "seed=1", "80% of their datasheet rate"),
        ],
    )
    def test_what_is_beyond_the_points_is_said(self, gpu, gpus, override, words):
        overrides = ["batch_size=64", "micro_batch_size=32"]
        plan = plan_of(Cluster.of(gpu, gpus), *overrides, override, points=POINTS)
        assert words in "\n".join(plan["notes"])


class TestScript:
    def test_the_table_is_the_json(self, tmp_path, capsys):
        assert SCRIPT.main([*ISSUE, "--json", str(tmp_path / "plan.json")]) == 0
        out, err = capsys.readouterr()
        plan = json.loads((tmp_path / "plan.json").read_text())
        assert err == "" and plan == plan_of(Cluster.of("A100", 64, 8, 200), *ISSUE[4:])
        words = " ".join(out.split())
        memory, seconds = plan["memory_bytes"], plan["step_seconds"]
        for text in (
            "64 A100: 8 nodes of 8, 200 Gbit/s",
            f"{plan['run']['parameters']:,} parameters, fsdp in 64 shards",
            f"about {memory['total'] / 1e9:.1f} of {memory['card'] / 1e9:.1f} GB",
            f"{plan['tokens_per_second']:,.0f}, all GPUs",
            f"MFU {plan['mfu']:.1%}",
            f"{plan['days']:,.2f} days, {plan['gpu_hours']:,.0f} GPU hours",
            f"a step {1000 * seconds['total']:,.1f} ms",
            *(f"{part} {1000 * seconds[part]:,.1f} ms" for part in seconds if part != "total"),
            *(f"{point['left_out_error']:+.1%}" for point in plan["points"]),
            *plan["notes"],
        ):
            assert text in words

    @pytest.mark.parametrize(
        "words", [ISSUE, ["gpus=1", "gpu=H200"], ["gpus=1", "gpu=A100", "optimizer=adamw"]]
    )
    @pytest.mark.parametrize("columns", [40, 60, 80, 200])
    def test_it_fits_the_terminal(self, columns, words, monkeypatch, capsys):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert SCRIPT.main(words) == 0
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= min(80, columns) and "…" not in out
        assert f"{load_points()[0].tokens_per_second:,}" in out and "GPUhours" in "".join(out.split())

    @pytest.mark.parametrize(
        ("words", "fragments"),
        [
            (["gpus=8", "gpu=A10O"], ["gpu=A10O", "did you mean A100?"]),
            (["gpus=8", "gpu=TPU"], ["gpu=TPU", "choose from A100, A100-40GB, H100, H200"]),
            (["gpus=8"], ["gpu is not given", "A100"]),
            (["gpu=A100"], ["gpus is not given"]),
            (["gpus=0", "gpu=A100"], ["gpus=0", "whole number"]),
            (["gpus=8", "gpu=A100", "network=-1"], ["network=-1", "above 0"]),
            (["gpus=12", "gpu=A100"], ["gpus=12", "gpus_per_node=8", "use gpus=8 or 16"]),
            (["gpus=64", "gpu=A100"], ["batch_size=480", "use 448 or 512"]),
            (["gpus=64", "gpu=A100", "batch_size=512"], ["hessian.batch_size=32", "hessian.batch_size=64"]),
            (["gpus=8", "gpu=A100", "parallel=hsdp"], ["parallel=hsdp", "several groups"]),
            (["gpus=1", "gpu=A100", "parallel=fsdp"], ["parallel=fsdp", "nobody to share with"]),
            (["gpus=8", "gpu=A100", "parallel=fsdp", "optimizer=sophia_h"], ["Hutchinson", "hessian=gnb"]),
            (["gpus=8", "gpu=A100", "precision=fp32"], ["precision=fp32", "precision=bf16"]),
            (["gpus=8", "gpu=A100", "processes=4"], ["processes=4", "gpus=8"]),
            (["gpus=8", "gpu=A100", "optimizer=sgd"], ["SGD", "Sophia, AdamW"]),
            (["gpus=8", "gpu=A100", "modle=gpt2_1_5b"], ["modle", "model"]),
            (["gpus=8", "gpu=A100", "--jason", "x"], ["--jason"]),
        ],
    )
    def test_bad_input_is_one_line(self, words, fragments, capsys):
        assert SCRIPT.main(words) == 64
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        for fragment in fragments:
            assert fragment in err

    def test_fewer_gpus_than_a_node_has_are_one_node(self):
        assert SCRIPT.cluster_of(["gpus=2", "gpu=H100", "gpus_per_node=8"]).nodes == 1
        with pytest.raises(ConfigError):
            SCRIPT.cluster_of(["gpus=12", "gpu=H100", "gpus_per_node=8"])
