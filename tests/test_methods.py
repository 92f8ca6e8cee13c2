"""Interventions and diagnostics: each against NumPy or a closed form, and what holds for all of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from nets import FORMS, build, init
from numpy.testing import assert_allclose, assert_array_equal

from plastic_jax import models
from plastic_jax.errors import InputError
from plastic_jax.kernels import Form
from plastic_jax.methods.diagnostics import DIAGNOSTICS
from plastic_jax.methods.diagnostics.dormant_units import scores
from plastic_jax.methods.interventions import INTERVENTIONS
from plastic_jax.models.units import chosen
from plastic_jax.study import plan, trial
from plastic_jax.study.config import FIELDS, Config, Sweep, canonical
from plastic_jax.train.core import Core
from plastic_jax.train.state import Beginning, Sums, resident

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def data_set():
    return jax.tree.map(jnp.asarray, resident(tiny.dataset()))


def sample():
    return jax.tree.map(jnp.asarray, tiny.sample())


def core(*interventions: str, model: str = "mlp", **fields) -> Core:
    point = Config(model=model, width=4, depth=2, norm="batch", batch_size=8, optimizer="sgd")
    return Core(point.replace(**fields), tiny.SPEC.shape, 5, Form("mapped"), interventions=interventions)


def stage(acting: dict[str, dict[str, float]], **more):
    strengths = {name: jnp.float32(value) for fields in acting.values() for name, value in fields.items()}
    return tiny.stage(acting={name: jnp.bool_(True) for name in acting}, strengths=strengths, **more)


def assert_trees(new, expected, **tolerance):
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
        assert_allclose(a, b, **tolerance)


def begun(one: Core, state, of, fresh: bool = False):
    how = Beginning(jnp.bool_(fresh), jnp.bool_(True), jnp.bool_(False))
    return quick_jit(one.start)(state, of, sample(), how, None)


# Shrink & perturb


@pytest.mark.parametrize(("shrink", "perturb"), [(0.6, 0.01), (0.4, 0.1), (1.0, 0.5)])
def test_shrink_and_perturb_is_its_formula_with_a_fresh_initialisation(shrink, perturb):
    one, plain = core("shrink_and_perturb"), core()
    state = quick_jit(one.init, static_argnums=1)(jnp.uint32(3), 50)
    later = dict(stream=np.int32(2), reset_optimizer=np.bool_(True))
    given = stage({"shrink_and_perturb": {"shrink": shrink, "perturb": perturb}}, **later)
    new = begun(one, state, given)
    # What `reinitialise` draws at the same boundary: another route to phi.
    phi = begun(plain, state, tiny.stage(redrawn=np.ones(3, bool), **later))
    expected = jax.tree.map(lambda old, fresh: shrink * old + perturb * fresh, state.params, phi.params)
    assert_trees(new.params, expected, rtol=1e-6, atol=1e-7)
    assert_trees(new.batch_stats, state.batch_stats, rtol=0)


def test_it_acts_on_no_first_stage_and_on_no_trial_that_does_not_have_it():
    one = core("shrink_and_perturb")
    state = quick_jit(one.init, static_argnums=1)(jnp.uint32(3), 50)
    given = stage({"shrink_and_perturb": {"shrink": 0.5, "perturb": 0.5}}, seed=np.uint32(3))
    off = given.replace(acting={"shrink_and_perturb": jnp.bool_(False)})
    for first, of in ((True, given), (False, off)):
        assert_trees(begun(one, state, of, fresh=first).params, state.params, rtol=0)


def test_its_pretraining_is_shared_with_trials_that_do_not_have_it():
    of = tiny.study(shrink=(1.0, 0.6), perturb=(0.0, 0.1), warm_start_epochs=(0, 3), equal_updates=False)
    (program,) = plan.programs(of)
    assert len({t.arm for t in of.trials}) == 1 + 4 and program.interventions == ("shrink_and_perturb",)
    pretraining = [node for node in program.nodes if node.stage.name == "pretraining"]
    assert len(pretraining) == 2 and all(len(node.trials) == 4 for node in pretraining)  # one a seed
    assert [arm.values["shrink"] for arm in of.arms if arm.fresh == arm.arm] == [None]


# L2 Init and weight decay


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_l2_init_descends_the_squared_distance_to_the_first_parameters(optimizer):
    """The gradient that the optimiser gets is g + 2 lambda (theta - theta_0)."""
    one, plain = core("l2_init", optimizer=optimizer), core(optimizer=optimizer)
    first = quick_jit(one.init, static_argnums=1)(jnp.uint32(1), 50)
    state = first.replace(params=jax.tree.map(lambda leaf: 1.5 * leaf + 0.1, first.params))
    sums = Sums(jnp.float32(0), jnp.int32(0), jnp.int32(0))
    local, data = jnp.arange(8, dtype=jnp.int32), data_set()

    def step(one, state, of):
        return quick_jit(one.step)(state, sums, of, sample(), local, data, state.memory)[0]

    moved = step(one, state, stage({"l2_init": {"l2_init": 0.3}}))
    images, labels = data.train_images[local], data.train_labels[local]
    gradients = plain.network.gradients(state.params, state.batch_stats, images, labels).gradients
    expected = jax.tree.map(lambda g, now, start: g + 2 * 0.3 * (now - start), gradients, state.params, first.params)
    params, _ = plain.optimiser.update(expected, state.optimiser, state.params, jnp.float32(0.1))
    assert_trees(moved.params, params, rtol=2e-5, atol=2e-6)
    assert_trees(moved.memory, {} if moved.memory == {} else first.memory, rtol=0)


def test_weight_decay_acts_in_the_core_as_in_the_gradient():
    """Against PyTorch over 20 steps: test_optimisers.py. Here: that the core calls it."""
    one, plain = core("weight_decay"), core()
    state = quick_jit(one.init, static_argnums=1)(jnp.uint32(1), 50)
    sums = Sums(jnp.float32(0), jnp.int32(0), jnp.int32(0))
    local, data = jnp.arange(8, dtype=jnp.int32), data_set()
    of = stage({"weight_decay": {"weight_decay": 0.2}})
    for decoupled in (False, True):  # with plain gradient descent they are the same
        made = core("weight_decay", decoupled=decoupled)
        with_it, without = (quick_jit(c.step)(state, sums, of, sample(), local, data)[0].params for c in (made, plain))
        expected = jax.tree.map(lambda new, old: new - 0.1 * 0.2 * old, without, state.params)
        assert_trees(with_it, expected, rtol=1e-6, atol=1e-7)


def test_trials_without_an_intervention_are_trained_without_it():
    """Bit for bit as in a study that does not name it: it is another program."""
    alone = tiny.study(warm_start_epochs=2)
    for field, value in (("l2_init", 0.1), ("weight_decay", 0.1), ("redo_interval", 3)):
        of = tiny.study(warm_start_epochs=2, **{field: (0, value)})
        found = tiny.trained(of)
        without = found[[str(own) in ("0", "0.0") for own in found[field]]]
        expected = tiny.trained(alone)
        kept = [c for c in expected.columns if c not in ("trial", "arm")]
        order = ["seed", "warm_start_epochs", "stage", "step"]
        a, b = (t.sort_values(order, ignore_index=True)[kept] for t in (without, expected))
        assert a.astype(str).equals(b.astype(str))
        assert len(found) > len(without)


def test_l2_init_is_trained_resumed_and_shared_like_all_else():
    of = tiny.study(l2_init=(0.01, 0.1), warm_start_epochs=(0, 2, 4))
    one, four = tiny.trained(of, slots=1), tiny.trained(of, slots=4, devices=2)
    tiny.same(one, four)
    assert one.groupby("l2_init")["train_loss"].mean().nunique() == 2


# Units, dormant units and ReDo


def test_scores_are_means_over_the_layers_mean():
    hidden = np.random.default_rng(0).normal(size=(6, 3, 3, 4)).astype(np.float32)
    hidden[..., 1] = 0
    means = np.abs(hidden).mean((0, 1, 2))
    assert_allclose(scores(jnp.asarray(hidden)), means / means.mean(), rtol=1e-5)
    assert_array_equal(scores(jnp.zeros((2, 3))), np.zeros(3))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", models.MODELS)
def test_hidden_units_are_those_of_a_network_in_plain_jax(model, form):
    """In every form; an MLP's against NumPy, a ResNet's against the mapped form and its own logits."""
    with jax.enable_x64(True):
        network = build(model, form=form, compute_dtype="float64")
        params, stats = init(build(model, compute_dtype="float64"), jax.random.key(4))
        images = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 1), np.uint8)
        hidden = network.hidden(params, stats, jnp.asarray(images))
        point = Config(model=model, width=2, depth=1)
        declared = models.MODELS[model].units(point)
        assert {place for layer in declared for place in layer.seen} == set(hidden)
        expected = build(model, compute_dtype="float64").hidden(params, stats, jnp.asarray(images))
        for name, values in hidden.items():
            assert_allclose(values, expected[name], atol=1e-12)
            assert values.min() == 0 and values.max() > 0
        if model == "mlp":
            linear = jax.tree.map(np.asarray, params["module_1"]["linear"])
            x = (images.reshape(5, -1) / 255 - 0.5) / 0.5 @ linear["kernel"] + linear["bias"]
            x = x / np.sqrt(1 + 1e-5)
            assert_allclose(hidden["module_1/hidden"], np.maximum(x, 0), atol=1e-6)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("model", models.MODELS)
def test_units_name_all_that_makes_and_reads_them(model, norm, depth):
    """A unit silenced through what makes it is silent where it is seen; its readers' weights then have no effect."""
    if norm == "layer":
        pytest.skip("LayerNorm's mean over channels makes every unit depend on all")
    network = build(model, depth=depth, norm=norm)
    params, stats = init(network, jax.random.key(2))
    point = Config(model=model, width=2, depth=depth)
    declared = models.MODELS[model].units(point)
    images = jnp.asarray(np.random.default_rng(3).integers(0, 256, (5, 8, 8, 1), np.uint8))
    hidden = network.hidden(params, stats, images)
    for layer in declared:
        which = [jnp.arange(hidden[other.seen[0]].shape[-1]) == (0 if other is layer else -1) for other in declared]
        into, out = (chosen(declared, which, params, side) for side in ("incoming", "outgoing"))
        silent = jax.tree.map(lambda leaf, mask: jnp.where(mask, 0, leaf), params, into)
        for place in layer.seen:
            assert not np.any(network.hidden(silent, stats, images)[place][..., 0])
        # All readers are named: with the unit silent, whatever they make of it changes nothing.
        other = jax.tree.map(lambda leaf, mask: jnp.where(mask, leaf + 7, leaf), silent, out)
        assert_array_equal(network.logits(other, stats, images), network.logits(silent, stats, images))
        # And only they read it: they being zero, whatever makes it changes nothing.
        deaf = jax.tree.map(lambda leaf, mask: jnp.where(mask, 0, leaf), params, out)
        loud = jax.tree.map(lambda leaf, mask: jnp.where(mask, leaf + 1, leaf), deaf, into)
        assert_allclose(network.logits(loud, stats, images), network.logits(deaf, stats, images), atol=1e-5)


@pytest.mark.parametrize("model", models.MODELS)
def test_dormant_units_counts_what_was_silenced(model):
    with_it = core(model=model, diagnostics="dormant_units", width=4, dormant_threshold=0.0)
    state = quick_jit(with_it.init, static_argnums=1)(jnp.uint32(1), 50)
    declared = models.MODELS[model].units(with_it.point)
    images = data_set().train_images[:5]
    hidden = with_it.network.hidden(state.params, state.batch_stats, images)
    sizes = [hidden[layer.seen[0]].shape[-1] for layer in declared]
    which = [jnp.arange(size) < 1 for size in sizes]
    mask = chosen(declared, which, state.params, "incoming")
    silent = state.replace(params=jax.tree.map(lambda leaf, m: jnp.where(m, 0, leaf), state.params, mask))
    measure = quick_jit(lambda s: with_it.methods.measure(s, tiny.stage(), sample(), data_set()))
    before = float(measure(state)["dormant_units"])
    after = float(measure(silent)["dormant_units"])
    dead = [
        sum(bool(np.all(hidden[place][..., 0] == 0) for place in layer.seen) for layer in declared)
        for layer in declared
    ]
    del dead
    assert after >= len(sizes) / sum(sizes) - 1e-6 and after > before


@pytest.mark.parametrize("model", models.MODELS)
def test_redo_starts_dead_units_anew_and_leaves_the_outputs_as_they_are(model):
    one = core("redo", model=model, redo_interval=10, optimizer="adam", norm="none")
    state = quick_jit(one.init, static_argnums=1)(jnp.uint32(1), 50)
    data, of = data_set(), stage({"redo": {"redo_threshold": 0.0}})
    declared = models.MODELS[model].units(one.point)
    hidden = one.network.hidden(state.params, state.batch_stats, data.train_images[:8])
    which = [jnp.arange(hidden[layer.seen[0]].shape[-1]) == 1 for layer in declared]
    into, out = (chosen(declared, which, state.params, side) for side in ("incoming", "outgoing"))
    moments = state.optimiser._replace(
        mu=jax.tree.map(jnp.ones_like, state.params), nu=jax.tree.map(jnp.ones_like, state.params)
    )
    silent = jax.tree.map(lambda leaf, mask: jnp.where(mask, 0, leaf), state.params, into)
    hidden = one.network.hidden(silent, state.batch_stats, data.train_images[:8])
    seen = [np.stack([np.asarray(hidden[place]) for place in layer.seen]) for layer in declared]
    which = [jnp.asarray(~values.any(tuple(range(values.ndim - 1)))) for values in seen]  # dead, these among them
    assert all(bool(dead[1]) for dead in which)
    into, out = (chosen(declared, which, state.params, side) for side in ("incoming", "outgoing"))
    due = state.replace(params=silent, optimiser=moments, total=jnp.int32(20), step=jnp.int32(20))
    examples = lambda _: jnp.arange(8, dtype=jnp.int32)  # noqa: E731
    act = quick_jit(lambda s: one.methods.at_interval(s, of, sample(), examples, data, {}))
    new = act(due)
    logits = [one.network.logits(s.params, s.batch_stats, data.train_images[:8]) for s in (due, new)]
    assert_allclose(logits[1], logits[0], atol=1e-5)
    for path_new, path_old, a, b in zip(*map(jax.tree.leaves, (new.params, due.params, into, out)), strict=True):
        a, b = np.broadcast_to(a, path_new.shape), np.broadcast_to(b, path_new.shape)
        assert_array_equal(np.asarray(path_new)[b], 0.0)  # outgoing
        assert_array_equal(np.asarray(path_new)[~a & ~b], np.asarray(path_old)[~a & ~b])
    kernels = [leaf for leaf in jax.tree.leaves(jax.tree.map(lambda m, n: jnp.where(m, n, 1), into, new.params))]
    assert any(np.any((leaf != 1) & (leaf != 0)) for leaf in kernels)  # drawn anew
    for moment in (new.optimiser.mu, new.optimiser.nu):
        for leaf, a, b in zip(*map(jax.tree.leaves, (moment, into, out)), strict=True):
            assert_array_equal(leaf, np.where(np.broadcast_to(a | b, leaf.shape), 0, 1))
    assert int(new.optimiser.count) == int(due.optimiser.count)
    assert_trees(act(due.replace(total=jnp.int32(21))).params, due.params, rtol=0)


def inner(equation):
    """The programs that an equation calls."""
    found = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr"))
    return [getattr(p, "jaxpr", p) for p in found if hasattr(p, "eqns") or hasattr(p, "jaxpr")]


def loops(jaxpr, depth=0):
    """(depth, equations inside) of every while loop of a program, from the outside in."""
    for equation in jaxpr.eqns:
        inner = [
            p for p in jax.tree.leaves(list(equation.params.values())) if hasattr(p, "jaxpr") or hasattr(p, "eqns")
        ]
        for found in inner:
            found = getattr(found, "jaxpr", found)
            if equation.primitive.name == "while":
                yield depth, found
            yield from loops(found, depth + (equation.primitive.name == "while"))


def products(jaxpr):
    """Matrix products and convolutions in a program, all that it calls included; of two branches, those of both."""
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name in ("dot_general", "conv_general_dilated")
        total += sum(map(products, inner(equation)))
    return total


@pytest.mark.parametrize("block", [1, 4])
def test_what_acts_at_intervals_has_no_part_in_a_step(block):
    """The loop over steps is the same program with K = 10, with K = 10^9, and without."""

    def program(*names, **fields):
        one = core(*names, **fields)
        if block > 1:
            one = Core(one.point, tiny.SPEC.shape, 5, Form("packed", block), interventions=names)
        state = one.init(jnp.uint32(0), 50)
        given = stage({"redo": {"redo_threshold": 0.1}} if names else {})
        data = data_set()

        def chunk(state, given, target):
            return one.chunk(state, given, sample(), target, data)

        stacked = (state, given, jnp.int32(1))
        if block > 1:
            stacked = jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * block), stacked)
        return jax.make_jaxpr(jax.vmap(chunk) if block > 1 else chunk)(*stacked).jaxpr

    def steps(jaxpr):
        deepest = max(depth for depth, _ in loops(jaxpr))
        return sorted(products(body) for depth, body in loops(jaxpr) if depth == deepest)

    often, seldom = (program("redo", redo_interval=k) for k in (10, 10**9))
    assert steps(often) == steps(seldom) == steps(program())
    text = str(often)
    assert products(often) > products(program()) and " cond[" in text
    if block > 1:  # the choice stays one for the block: a select would compute both branches
        assert str(seldom).count(" cond[") == text.count(" cond[")


def test_redo_of_trials_side_by_side_equals_redo_of_each():
    of = tiny.study(redo_interval=3, redo_threshold=(0.1, 0.9), warm_start_epochs=(0, 2), norm="none")
    tiny.same(tiny.trained(of, slots=2), tiny.trained(of, slots=4, devices=2))
    plain = tiny.trained(tiny.study(warm_start_epochs=(0, 2), norm="none"))
    assert set(plain.train_loss) & set(tiny.trained(of).train_loss) != set(plain.train_loss)


def test_diagnostics_change_no_result():
    plain = tiny.study()
    measured = tiny.study(diagnostics="+".join(DIAGNOSTICS))
    found = tiny.trained(measured)
    columns = [c.name for d in DIAGNOSTICS.values() for c in d.columns]
    tiny.same(found.drop(columns=columns), tiny.trained(plain))
    assert found[columns].notna().all().all() and (found.dormant_units <= 1).all()


def test_weight_norm_is_the_norm_of_all_parameters():
    one = core(diagnostics="weight_norm")
    state = quick_jit(one.init, static_argnums=1)(jnp.uint32(1), 50)
    measured = one.methods.measure(state, tiny.stage(), sample(), data_set())["weight_norm"]
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state.params)]
    assert_allclose(measured, np.sqrt(sum((leaf**2).sum() for leaf in leaves)), rtol=1e-6)


# What is declared


def test_a_method_that_is_off_has_fields_without_effect():
    point = Config(model="mlp", warm_start_epochs=3)
    assert canonical(point)["redo_threshold"] is None and canonical(point)["l2_init"] == 0.0
    assert canonical(point.replace(redo_interval=5))["redo_threshold"] == 0.1
    fresh = canonical(point.replace(warm_start_epochs=0, shrink=0.5, l2_init=0.1))
    assert fresh["shrink"] is None and fresh["perturb"] is None and fresh["l2_init"] == 0.1


@pytest.mark.parametrize("registry", [INTERVENTIONS, DIAGNOSTICS], ids=["interventions", "diagnostics"])
def test_every_entry_is_a_short_file_whose_fields_are_in_the_config(registry):
    for name, entry in registry.items():
        assert type(entry).__module__.endswith(f".{name}")
        with open(__import__("sys").modules[type(entry).__module__].__file__) as file:
            assert len(file.readlines()) <= 65, name
        for field in entry.fields:
            assert FIELDS[field].doc and FIELDS[field].name == field


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"diagnostics": "dormant_unit"}, ["diagnostics='dormant_unit'", "dormant_units, weight_norm"]),
        ({"shrink": 1.5}, ["shrink=1.5", "from 0 to 1"]),
        ({"redo_interval": -1}, ["redo_interval=-1", "at least 0"]),
    ],
)
def test_bad_values_are_one_sentence(fields, words):
    with pytest.raises(InputError) as error:
        Sweep.of(fields)
    assert all(word in str(error.value) for word in words)


def test_methods_on_units_refuse_a_model_that_does_not_declare_them(register):
    register(models.MODELS, "bare", models.Model(models.MODELS["mlp"].build))
    for fields in ({"redo_interval": 5}, {"diagnostics": "dormant_units"}):
        with pytest.raises(InputError, match=r"model=bare: this model does not declare its units"):
            trial.study(Sweep.of({**tiny.CONFIG, "model": "bare", **fields}), {"noise": tiny.SPEC}, {})
