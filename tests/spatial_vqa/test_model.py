"""The model: text as it should be read, the encoder as LLaVA's tower, and the designs as they are named."""

from dataclasses import replace
from itertools import product
from random import Random

import pytest
import torch

pytest.importorskip("torch", minversion="2.9")  # Muon
pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.spatial_vqa import attention, compressed, encoder, language_model, probes, training
from benchmarks.spatial_vqa.designs import (
    BINS,
    CROPPING,
    DEEP,
    DESIGNS,
    DETAIL,
    FACTORS,
    LEARNED,
    MLP,
    PLACES,
    POOLING,
    count_kernel_parameters,
    install,
)
from benchmarks.spatial_vqa.language_model import HIDDEN_SIZE, inputs_of, lay_out, read, text_of
from benchmarks.spatial_vqa.layout import GRID, NOTHING, cover
from benchmarks.spatial_vqa.model import build_llava
from benchmarks.spatial_vqa.splits import examples, pictures
from benchmarks.spatial_vqa.training import BATCH, STAGES, KernelRate, Material, Schedule, another_pictures, logits_of, prefix_of
from benchmarks.spatial_vqa.words import IDS, IGNORED, WORDS, encode, list_of, pack, questions_of, records_of
from spatial_tokens import SpatialTokensError
from spatial_tokens.demo.questions import KINDS
from spatial_tokens.demo.scenes import RADII, render
from spatial_tokens.training import ALIGNMENT, INSTRUCTION_TUNING


@pytest.fixture(scope="module")
def found():
    return examples("train", 8)


@pytest.fixture(scope="module")
def words():
    torch.manual_seed(0)
    model = language_model.LlamaForCausalLM(language_model.llama_config())
    return {name: each.detach() for name, each in model.named_parameters()}


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(1)
    return encoder.build_encoder().eval().requires_grad_(False)


@pytest.fixture
def llava(vit, words):
    def make():
        torch.manual_seed(2)
        return build_llava(vit, language_model.own(words))

    return make


def test_a_packed_row_is_as_its_questions_one_by_one(found, words):
    model = language_model.load(words)
    prefixes = [[place[0] for place in lay_out(each.scene.things, Random(0), spread=True)] for each in found[:3]]
    segments = [[*questions_of(each.questions), list_of(each), *records_of(each.scene.things)] for each in found[:3]]
    rows = pack(prefixes, segments)
    logits = model(**inputs_of(rows)).logits
    for row, (prefix, following) in enumerate(zip(prefixes, segments, strict=True)):
        at = len(prefix)
        for segment in following:
            alone = model(torch.tensor([[*prefix, *segment.ids]])).logits[0, len(prefix) :]
            torch.testing.assert_close(logits[row, at : at + len(segment.ids)], alone, rtol=1e-4, atol=1e-4)
            at += len(segment.ids)


def test_labels_stand_where_their_words_are_predicted(found):
    question, record, listed = questions_of(found[0].questions)[0], records_of(found[0].scene.things)[0], list_of(found[0])
    prefix = [IDS["<s>"], IDS["."]]
    rows = pack([prefix], [[question, record, listed]])
    labels = rows.labels[0]
    answer = 2 + len(question.ids) - 2
    assert labels[answer] == question.ids[-1]
    after = 2 + len(question.ids)
    assert labels[after : after + 3].tolist() == record.ids[1:]
    assert labels[1] == listed.ids[0]  # the prefix's last token foretells what follows it alone
    assert (labels != IGNORED).sum() == 1 + 3 + len(listed.ids)


def test_all_that_is_said_is_in_the_vocabulary_once(found):
    assert len(set(WORDS)) == len(WORDS)
    for each in found:
        assert encode(each.caption)
        assert text_of(each, Random(0))


@pytest.mark.parametrize("spread", [False, True])
def test_a_text_says_where_things_are(found, spread):
    for each in found:
        first, *places = lay_out(each.scene.things, Random(3), spread)
        assert first == (IDS["<s>"], NOTHING, NOTHING, NOTHING)
        told = {}
        for name, size, column, row in places:
            if name != IDS["."]:
                where = int(WORDS[column].split("-")[1]), int(WORDS[row].split("-")[1])
                told.setdefault(WORDS[name], set()).add((WORDS[size], *where))
        assert told.keys() == {thing.name for thing in each.scene.things}
        for thing in each.scene.things:
            allowed = {(thing.size, *place) for place in (cover(thing) if spread else [(thing.x // 8, thing.y // 8)])}
            assert told[thing.name] <= allowed


def test_a_places_words_are_added(found, words):
    model = language_model.load(words)
    example = found[0]
    places = lay_out(example.scene.things, Random(0), spread=False)
    segments = questions_of(example.questions)[:1]
    logits, _ = read(model, [(places, segments)])
    table = words["model.embed_tokens.weight"]
    embedded = [sum(table[word] for word in place if word != NOTHING) for place in places] + [
        table[word] for word in segments[0].ids
    ]
    expected = model(inputs_embeds=torch.stack(embedded)[None]).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_features_are_those_of_the_last_layer_but_one(vit, found):
    pixels = encoder.as_pixels(torch.from_numpy(pictures(found[:2])))
    seen = []
    hook = vit.blocks[-2].register_forward_hook(lambda module, inputs, output: seen.append(output))
    vit.forward_features(pixels)
    hook.remove()
    torch.testing.assert_close(encoder.features_of(vit, pixels), seen[0])


def test_rolled_features_stand_where_their_patches_are(vit, found):
    pixels = encoder.as_pixels(torch.from_numpy(pictures(found[:2])))
    without = encoder.build_encoder().eval().requires_grad_(False)
    without.load_state_dict(vit.state_dict())
    without.pos_embed.zero_()  # then a patch's feature does not depend on the roll
    rolled = encoder.rolled_features_of(without, pixels, Random(0))
    torch.testing.assert_close(rolled, encoder.features_of(without, pixels), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(encoder.rolled_features_of(vit, pixels, Random(0)), encoder.features_of(vit, pixels), atol=1e-2)


@pytest.mark.parametrize("design", [MLP, CROPPING], ids=lambda each: each.name)
def test_features_computed_before_are_as_pictures(llava, found, vit, design):
    model = llava()
    install(design, model)
    model.eval()
    pixels = encoder.as_pixels(torch.from_numpy(pictures(found[:2])))
    inputs = inputs_of(pack([prefix_of(model)] * 2, [questions_of(each.questions) for each in found[:2]]))
    from_pictures = model(**inputs, pixel_values=pixels).logits
    torch.testing.assert_close(model(**inputs, pixel_values=encoder.features_of(vit, pixels)).logits, from_pictures)
    moved = encoder.features_of(vit, pixels).clone()
    moved[:, 0] += 100  # the class token is dropped
    torch.testing.assert_close(model(**inputs, pixel_values=moved).logits, from_pictures)


def parameters_of(design, llava):
    return sum(each.numel() for part in install(design, llava()).projector for each in part.parameters())


def test_designs_are_as_large_as_they_are_said_to_be(llava):
    mlp, cropping = (parameters_of(each, llava) for each in (MLP, CROPPING))
    assert mlp == 128 * 512 + 512 + 512 * HIDDEN_SIZE + HIDDEN_SIZE
    kernels = sum(128 * 64 * k * k for k in (2, 4, 6, 8, 10, 12))
    assert cropping == mlp + kernels + (64 * 128 + 128 + 128 * 128 + 128)
    assert parameters_of(POOLING, llava) == cropping
    assert [count_kernel_parameters(each) for each in (MLP, CROPPING, POOLING)] == [0, kernels, kernels]
    assert parameters_of(DEEP, llava) == pytest.approx(cropping, rel=1e-3)
    assert parameters_of(LEARNED, llava) == mlp + 6 * 64 + (64 * 128 + 128 + 128 * 128 + 128)


@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
def test_a_design_gives_its_tokens(llava, design, found):
    model = llava()
    install(design, model)
    prefix = prefix_of(model)
    count = 0 if design.fields is None else 6
    count = int(design.name.split()[0]) if design.name[0].isdigit() else count
    assert len(prefix) == 1 + count + GRID * GRID
    features = torch.randn(2, 1 + GRID * GRID, 128)
    logits, _ = logits_of(model, design, prefix, features, [questions_of(each.questions) for each in found[:2]])
    assert logits.isfinite().all()
    if design in DETAIL:
        patches = features[:, 1:]
        _, attention = model.spatial_tokens(patches, return_attention=True)
        side = int(design.name.split()[-1])
        assert attention.shape == (2, 6, side * side)


@pytest.mark.parametrize(
    "design", [each for each in DESIGNS.values() if {"cropping", "pooling"} & set(each.name.split())], ids=lambda each: each.name
)
def test_pooling_sees_the_border_with_its_smallest_kernel_and_cropping_does_not(llava, design):
    model = llava()
    install(design, model)
    model.eval()
    patches = torch.randn(1, GRID * GRID, 128)
    moved = patches.clone()
    moved[:, 0] += 1
    first, again = (model.spatial_tokens.extractor(each)[:, 0] for each in (patches, moved))
    assert torch.equal(first, again) == ("cropping" in design.name.split())


def test_learned_tokens_do_not_look_and_a_blind_model_sees_nothing(llava):
    model = llava()
    install(LEARNED, model)
    one, two = model.spatial_tokens(torch.randn(2, GRID * GRID, 128))
    assert torch.equal(one, two)
    blind = DESIGNS["MLP, blind"]
    model = llava()
    install(blind, model)
    asked = [questions_of(examples("test", 1)[0].questions)]
    logits = [logits_of(model.eval(), blind, prefix_of(model), torch.randn(1, 1 + GRID * GRID, 128), asked)[0] for _ in range(2)]
    assert torch.equal(*logits)


def test_another_pictures_tokens(llava):
    model = llava().eval()
    install(CROPPING, model)
    mlp, spatial = model.model.multi_modal_projector, model.spatial_tokens
    features = torch.randn(2, 1 + GRID * GRID, 128)
    asked = [questions_of(each.questions) for each in examples("test", 2)]

    def logits(features):
        return logits_of(model, CROPPING, prefix_of(model), features, asked)[0]

    own, others = logits(features), logits(features.roll(1, 0))
    with another_pictures(mlp), another_pictures(spatial):
        assert torch.equal(logits(features), others)
    with another_pictures(spatial):
        mixed = logits(features)
    assert not torch.equal(mixed, own)
    assert not torch.equal(mixed, others)
    with another_pictures(mlp):
        torch.testing.assert_close(logits(features.roll(1, 0)), mixed, rtol=0, atol=0)
    assert torch.equal(logits(features), own)


def test_the_stages_are_the_papers_but_for_batch_and_rates():
    for stage, paper in zip(STAGES, (ALIGNMENT, INSTRUCTION_TUNING), strict=True):
        assert stage.global_batch_size == BATCH
        assert (stage.warmup_ratio, stage.weight_decay, stage.lora is None) == (
            paper.warmup_ratio,
            paper.weight_decay,
            paper.lora is None,
        )


def material(vit):
    return {
        split: Material.of(encoder.features_of(vit, encoder.as_pixels(torch.from_numpy(pictures(found)))), found)
        for split, found in ((name, examples(name, 8)) for name in ("train", "validation", "test", "hard"))
    }


def test_the_same_seed_gives_the_same_run_and_another_does_not(llava, vit):
    seen = material(vit)
    plan = Schedule(8, (2, 2), curve=2)
    one, again, other = (training.run(CROPPING, seed, llava, seen, plan) for seed in (0, 0, 1))
    weights = [model.spatial_tokens.state_dict() for _, model in (one, again, other)]
    assert all(torch.equal(each, weights[1][name]) for name, each in weights[0].items())
    assert not all(torch.equal(each, weights[2][name]) for name, each in weights[0].items())
    keys = ("test", "hard", "projector_parameters", "steps")
    assert {key: one[0][key] for key in keys} == {key: again[0][key] for key in keys}
    assert [each["loss"] for each in one[0]["curve"]] == [each["loss"] for each in again[0]["curve"]]
    assert [each["loss"] for each in one[0]["curve"]] != [each["loss"] for each in other[0]["curve"]]
    assert [each["step"] for each in one[0]["curve"]] == [1, 2]
    assert one[0]["strangers"].keys() == {"patch", "spatial"}


def test_a_seed_gives_every_design_the_same_scenes_in_the_same_order(llava, vit, monkeypatch):
    seen, loss_of, told = material(vit), training.loss_of, []

    def recorded(*arguments):
        told[-1].append(arguments[4:])
        return loss_of(*arguments)

    monkeypatch.setattr(training, "loss_of", recorded)
    for design in (MLP, CROPPING, POOLING):
        told.append([])
        training.run(design, 0, llava, seen, Schedule(5, (1, 2), curve=1))
    assert told[0] == told[1] == told[2]
    assert [texts is seen["train"].captions for texts, _ in told[0]] == [True, False, False]
    assert all(texts is seen["train"].questions for texts, _ in told[0][1:])
    assert {scene for _, chosen in told[0] for scene in chosen} == set(range(5))  # of 8: as many as the schedule says


def test_another_rate_is_the_projectors_alone(llava, vit, monkeypatch):
    rates, schedule = [], training.schedule

    def recorded(optimizer, *arguments):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return schedule(optimizer, *arguments)

    monkeypatch.setattr(training, "schedule", recorded)
    training.run(MLP, 0, llava, material(vit), Schedule(8, (1, 1), curve=1), scale=0.25)
    projector, lora = STAGES[1].projector_learning_rate, STAGES[1].lora.learning_rate
    assert set(rates[0]) == {STAGES[0].projector_learning_rate / 4}
    assert set(rates[1]) == {projector / 4, lora}


@pytest.mark.parametrize("rate", [KernelRate(0.1), KernelRate(by_fan_in=True), KernelRate(2, by_fan_in=True)], ids=str)
def test_kernels_have_a_rate_of_their_own(llava, rate):
    model = llava()
    parts = install(CROPPING, model)
    by_parameter = {id(each): group["lr"] for group in rate.groups(parts, STAGES[0]) for each in group["params"]}
    common = STAGES[0].projector_learning_rate
    assert by_parameter.keys() == {id(each) for part in parts.projector for each in part.parameters()}
    for kernel, side in zip(model.spatial_tokens.extractor.kernels, (2, 4, 6, 8, 10, 12), strict=True):
        expected = rate.scale * common / (side**2 if rate.by_fan_in else 1)
        assert by_parameter.pop(id(kernel.weight)) == pytest.approx(expected)
    assert set(by_parameter.values()) == {common}


def test_a_run_trains_kernels_at_their_rate(llava, vit):
    seen = material(vit)
    plan = Schedule(8, (2, 2), curve=1)
    models = [training.run(CROPPING, 0, llava, seen, plan, kernel_rate=KernelRate(scale))[1] for scale in (1.0, 0.0)]
    torch.manual_seed(0)
    start = llava()
    install(CROPPING, start)
    moved, still = (list(model.spatial_tokens.extractor.parameters()) for model in models)
    first = list(start.spatial_tokens.extractor.parameters())
    assert all(map(torch.equal, still, first))
    assert not any(map(torch.equal, moved, first))
    heads = [model.spatial_tokens.spatial_head.state_dict() for model in (*models, start)]
    assert not any(torch.equal(heads[1][name], heads[2][name]) for name in heads[0])


def test_bins_are_means_of_crops(llava):
    model = llava()
    install(BINS, model)
    bins = model.spatial_tokens.extractor
    features = torch.randn(2, GRID * GRID, 128)
    seen = features @ bins.channel_projection.weight.T
    for number, side in enumerate((2, 4, 6, 8, 10, 12)):
        first, count = (GRID - side) // 2, min(3, side)
        means = []
        for row, column in product(range(count), repeat=2):
            rows, columns = (range(first + i * side // count, first - (-(i + 1) * side // count)) for i in (row, column))
            means.append(torch.stack([seen[:, r * GRID + c] for r in rows for c in columns]).mean(0) * side / count)
        token = torch.stack(means, dim=2).flatten(1) @ bins.linears[number].weight.T
        torch.testing.assert_close(bins(features)[:, number], token, rtol=1e-4, atol=1e-5)


def test_places_are_added_to_patches_and_are_zero_at_first(llava):
    model = llava()
    parts = install(PLACES, model)
    (embedding,) = parts.kernels
    features = torch.randn(2, GRID * GRID, 128)
    before = model.model.multi_modal_projector(features)
    assert embedding.places.abs().max() == 0
    assert before.abs().max() > 0
    with torch.no_grad():
        embedding.places.copy_(torch.randn(GRID * GRID, HIDDEN_SIZE))
    torch.testing.assert_close(model.model.multi_modal_projector(features), before + embedding.places)


@pytest.mark.parametrize("design", FACTORS, ids=lambda each: each.name)
def test_what_replaces_dense_kernels_is_small(llava, design):
    parts = install(design, llava())
    kernels = sum(each.numel() for part in parts.kernels for each in part.parameters())
    assert kernels < 2_981_888 / 5
    assert count_kernel_parameters(design) == (0 if design is PLACES else kernels)
    own = {id(each) for part in parts.projector for each in part.parameters()}
    assert {id(each) for part in parts.kernels for each in part.parameters()} <= own


def test_a_model_is_restored_of_what_it_has_learned(llava, vit):
    seen = material(vit)
    found, model = training.run(CROPPING, 0, llava, seen, Schedule(8, (1, 2), curve=1))
    tensors = training.trained_tensors(model)
    again, parts = compressed.restore(CROPPING, llava, tensors)
    for name, each in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], each), name
    assert training.ask(again, CROPPING, prefix_of(again), seen["test"]) == found["test"]
    own = {id(each) for part in (*parts.projector, *parts.lora) for each in part.parameters()}
    assert {name for name, each in again.named_parameters() if id(each) in own} == tensors.keys()
    with pytest.raises(SpatialTokensError, match="not those that this design trains"):
        compressed.restore(MLP, llava, tensors)


def test_noise_is_looked_at_as_scenes_are(llava, vit, found):
    model = llava().eval()
    install(DETAIL[0], model)
    scenes = encoder.features_of(vit, encoder.as_pixels(torch.from_numpy(pictures(found))))
    noise = encoder.features_of(vit, attention.noise_pixels(attention.PICTURES))
    looked = attention.measure_attention(model, scenes)
    assert looked["noise"] == attention.measure_attention(model, noise)["scenes"] != looked["scenes"]


def test_a_run_trains_the_projector_and_lora_and_nothing_else(llava, vit):
    before = {name: each.clone() for name, each in llava().named_parameters()}
    _, model = training.run(CROPPING, 0, llava, material(vit), Schedule(8, (2, 2), curve=1))
    for name, each in model.named_parameters():
        own = name.replace(".base_layer", "")
        if own in before and "multi_modal_projector" not in name:
            assert torch.equal(each[: before[own].shape[0]], before[own]), name
        else:
            assert any(part in name for part in ("multi_modal_projector", "spatial_tokens", "lora_")), name
    learned = [each for name, each in model.named_parameters() if "lora_B" in name]
    assert len(learned) == 7 * 3
    assert all(each.abs().max() > 0 for each in learned)


def test_answers_are_counted_by_kind(llava, vit, found):
    model = llava()
    install(MLP, model)
    seen = Material.of(encoder.features_of(vit, encoder.as_pixels(torch.from_numpy(pictures(found)))), found)
    counts = training.ask(model, MLP, prefix_of(model), seen)
    assert {kind: asked for kind, (_, asked) in counts.items()} == dict.fromkeys(KINDS, 8)
    logits, labels = logits_of(model, MLP, prefix_of(model), seen.features, seen.questions)
    right = language_model.tally(torch.nn.functional.one_hot(labels.clamp(min=0), len(WORDS)).float(), labels, seen.questions)
    assert all(one == asked for one, asked in right.values())
    none = language_model.tally(torch.zeros_like(logits), labels, seen.questions)
    assert all(one == 0 for one, _ in none.values())


def test_pretraining_learns():
    told = []
    language_model.train_language_model(examples("train", 64), encoder.Pretraining(64, 12, 16, 4e-3), 0, told.append)
    assert len(told) == 12
    assert sum(told[-3:]) > sum(told[:3]) + 0.2
    seen = []
    vision = encoder.train_encoder(examples("train", 16), encoder.Pretraining(16, 3, 8, 3e-3), 0, seen.append)
    assert len(seen) == 3
    assert all(each.isfinite().all() for each in vision.parameters())


def test_linear_readers_find_what_is_there_and_no_more():
    scenes = examples("train", 60)
    told = probes.labels_of(scenes)
    features = torch.zeros(60, 1 + GRID * GRID, 64)
    _, column = told["column"]
    _, shape = told["shape"]
    features[:, 1:, :12] = torch.nn.functional.one_hot(column, 12)
    features[:, 1:, 12:18] = torch.nn.functional.one_hot(shape.clamp(min=0), 6) * (shape != probes.NOTHING)[..., None]
    features += 0.01 * torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    found = probes.read_patches((features[:40], scenes[:40]), (features[40:], scenes[40:]))
    assert found["column"] == [1.0, pytest.approx(1 / 12)]
    sizes = probes.labels_of(scenes[40:])["size"][1]
    most = (sizes == list(RADII).index("large")).sum() / (sizes != probes.NOTHING).sum()  # of the patches
    assert found["size"][1] == pytest.approx(most.item())
    assert found["shape"][0] == 1.0
    assert abs(found["row"][0] - 1 / 12) < 0.06
    assert found["color"][0] < 0.35


def test_a_patch_is_in_the_thing_that_is_drawn_there(found):
    for example in found:
        _, colors = probes.labels_of([example])["color"]
        blank = replace(example.scene, things=(), clutter=0)
        changed = abs(render(replace(example.scene, clutter=0)).astype(float) - render(blank)).max(-1) > 60
        by_patch = torch.from_numpy(changed).unflatten(0, (GRID, -1)).unflatten(2, (GRID, -1)).sum((1, 3)).flatten()
        assert (colors[0][by_patch > 8] != probes.NOTHING).all()
        assert (by_patch[colors[0] == probes.NOTHING] <= 8).all()
