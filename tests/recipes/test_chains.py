"""Recipes without a buffer: starts, steps, chains and losses are those of the published loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastebm import ops, recipes
from fastebm.rng import Stream
from fastebm.training import calibration_loss
from tests.recipes import published
from tests.recipes.published import F64, Bowl, ConvNet, gradient, noise_of
from tests.recipes.test_persistent import assert_same_loss, real_images

SEED, IDS, FIRST = 21, torch.tensor([4, 9, 2, 7, 5]), 30
WHERE = {"seed": SEED, "chain_ids": IDS, "start_step": FIRST}
STEPS = pytest.mark.parametrize("num_steps", [1, None], ids=["step", "chain"])


def at_address(shape, stream, step=FIRST, dtype=F64):
    return ops.normal(shape, seed=SEED, step=step, stream=stream, chain_ids=IDS, dtype=dtype)


def overrides(num_steps):
    return {"engine": "autograd"} | ({} if num_steps is None else {"num_steps": num_steps})


def assert_close(found, wanted, atol=1e-6):
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


@STEPS
@pytest.mark.parametrize("net", [Bowl(), ConvNet()], ids=["bowl", "conv"])
def test_short_run(net, num_steps):
    recipe = recipes.short_run(net, **overrides(num_steps))
    negatives = recipe.negatives(real_images(), **WHERE)
    start = 2 * ops.uniform((5, 1, 8, 8), seed=SEED, stream=Stream.BUFFER_RESTART, chain_ids=IDS).double() - 1
    assert_close(negatives.start, start)
    noise = noise_of(SEED, FIRST, IDS)
    assert_close(negatives.x, published.short_run_chain(net, start, noise, recipe.num_steps))
    real = real_images()
    wanted = -((-net(real)).mean() - (-net(negatives.x)).mean())
    assert_same_loss(net, recipe.loss(net, real, negatives), wanted)


@STEPS
def test_cf_ebm(num_steps):
    """Chains of a cascade are float32, so that the float64 loop differs by their rounding."""
    levels = {size: Bowl(0.05, center).float() for size, center in ((4, 0.3), (8, -0.2))}
    recipe = recipes.cf_ebm(levels, **overrides(num_steps))
    real = real_images().float()
    negatives = recipe.negatives(real, **WHERE)
    count = num_steps or 15
    sigmas = torch.linspace(0.015, 0.0, 2 * count, dtype=F64)
    x = 2 * ops.uniform((5, 1, 4, 4), seed=SEED, step=FIRST, stream=Stream.INITIAL, chain_ids=IDS).double() - 1
    for k in range(count):
        x = x - gradient(levels[4], x) + sigmas[k] * noise_of(SEED, FIRST, IDS)(k, x)
    x = F.interpolate(x, scale_factor=2, mode="nearest").clamp(-1, 1)
    assert_close(negatives.start.double(), x, 2e-6)
    for k in range(count, 2 * count):
        x = x - gradient(levels[8], x) + sigmas[k] * noise_of(SEED, FIRST, IDS)(k, x)
    assert_close(negatives.x.double(), x, 2e-6)
    net = levels[8]
    torch.testing.assert_close(recipe.loss(net, real, negatives), net(real).mean() - net(negatives.x).mean())


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.layer = nn.Linear(6, 64)
        self.double()

    def forward(self, z):
        return self.layer(z).tanh().unflatten(1, (1, 8, 8))


@STEPS
@pytest.mark.parametrize("scale", [1.0, 20.0], ids=["near", "beyond the hinge"])
def test_ec_vae(scale, num_steps):
    net, decoder = ConvNet(scale=scale), Decoder()
    recipe = recipes.ec_vae(net, decoder, latent=6, **overrides(num_steps))
    real = real_images()
    negatives = recipe.negatives(real, **WHERE)
    z = at_address((5, 6), Stream.PRIOR, dtype=torch.float32).double()
    assert torch.equal(negatives.latents, z)
    x0 = decoder(z).detach()
    assert torch.equal(negatives.start, x0)
    # The anchor moves a chain by less than 1e-6, so that the sampler's float32 step size and noise count here.
    tau, steps = 1e-5, recipe.num_steps
    epsilon, std = 2 * tau * float(np.float32(0.5 * 1e-6 / tau)), float(np.float32(math.sqrt(1e-6)))
    x, outside = x0.clone(), 0
    for k in range(steps):
        weight = (steps - k - 1) / steps

        def anchor(y, weight=weight):
            return weight * (y - x0).square().flatten(1).sum(1).clamp(min=0.07)

        outside += int(((x - x0).square().flatten(1).sum(1) > 0.07).sum())
        x = x - 0.5 * epsilon * (gradient(net, x) / tau + gradient(anchor, x))
        x = x + std * noise_of(SEED, FIRST, IDS)(k, x)
    assert (outside > 0) == (scale == 20.0 and steps > 1)
    assert_close(negatives.x, x, 1e-10)
    wanted = net(real).mean() - net(negatives.x).mean()
    assert_same_loss(net, recipe.loss(net, real, negatives), wanted)
    # The loss of the VAE, and the weight of the calibration.
    mean, log_variance, made = torch.ones(5, 6, dtype=F64), torch.zeros(5, 6, dtype=F64), decoder(z * 0.9)
    wanted = ((real - made) ** 2).sum() / 5 + 0.1 * 0.5 * 6 + 30 * ((negatives.x - decoder(z)) ** 2).sum() / 5
    found = recipe.decoder_loss(real, made, mean, log_variance, negatives, recipe.lambda_start)
    assert_same_loss(decoder, found, wanted)
    calibration = calibration_loss(decoder(z), negatives.x).item()
    assert recipe.dual(30.0, calibration) == pytest.approx(min(max(30 + 0.01 * (calibration - 0.05), 0), 100))


@STEPS
@pytest.mark.parametrize("net", [Bowl(), ConvNet()], ids=["bowl", "conv"])
def test_energy_matching(net, num_steps):
    recipe = recipes.energy_matching(net, **overrides(num_steps))
    real = real_images()
    negatives = recipe.negatives(real, **WHERE)
    noise = noise_of(SEED, FIRST, IDS)
    x = torch.cat((real[:2], at_address(real.shape, Stream.INITIAL)[2:]))
    assert torch.equal(negatives.start, x)
    for k in range(recipe.num_steps):
        t = k * 0.01
        epsilon = torch.tensor([0.01, 0.01] + [0.0 if t < 1 else 0.01] * 3, dtype=F64)
        x = x - 0.01 * gradient(net, x) + (2 * 0.01 * epsilon).sqrt().view(-1, 1, 1, 1) * noise(k, x)
    assert_close(negatives.x, x.clamp(-1, 1))
    assert not torch.equal(x.clamp(-1, 1), x)


def test_loss_of_energy_matching():
    net = ConvNet(scale=30.0)
    recipe = recipes.energy_matching(net, num_steps=1, engine="autograd")
    real, other = real_images(24), real_images(24).flip(0) * 0.5
    negatives = recipe.negatives(other, seed=1)
    torch.manual_seed(5)
    found = recipe.loss(net, real, negatives)
    torch.manual_seed(5)
    x0 = torch.randn_like(real)
    cost = (x0.flatten(1)[:, None] - real.flatten(1)[None]).square().sum(-1)
    chosen = torch.randint(24, (24,))
    rows, columns = scipy_assignment(cost)
    assert rows.tolist() == list(range(24))
    x0, x1 = x0[chosen], real[columns][chosen]
    t = torch.rand(24, dtype=F64)[:, None, None, None]
    at = ((1 - t) * x0 + t * x1).requires_grad_()
    velocity = -torch.autograd.grad(net(at).sum(), at, create_graph=True)[0]
    flow = (velocity - (x1 - x0)).square().mean(dim=[1, 2, 3]).mean()
    energies = net(negatives.x).sort()[0][: 24 - 2]
    wanted = flow + torch.maximum(1e-3 * (net(other).mean() - energies.mean()), torch.tensor(-1.0))
    assert_same_loss(net, found, wanted)


def scipy_assignment(cost):
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(cost.numpy())


def test_generation_by_energy_matching():
    net = ConvNet()
    recipe = recipes.energy_matching(net, engine="autograd")
    x = x0 = at_address((5, 1, 8, 8), Stream.INITIAL)
    for _ in range(7):
        k1 = -gradient(net, x)
        k2 = -gradient(net, x + 0.01 * k1)
        x = x + 0.01 / 2 * (k1 + k2)
    assert_close(recipe.flow(x0, 7), x)


class Leveled(nn.Module):
    """An energy that depends on a level, a number for each sample."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.net = ConvNet(scale=scale)

    def forward(self, x, level):
        return self.net(x) * (2 + level.to(x) / 10)


def recovery_constants():
    """sigmas, a_s, sigmas_cum and a_s_prev of recovery_likelihood's `model.py`, by its own formulas."""
    betas = np.append(np.linspace(0.0001, 0.02, 1000), 1.0)
    sqrt_alphas = np.sqrt(1.0 - betas)
    idx = np.concatenate([np.arange(6) * (1000 // 10), [999]])
    first = [np.prod(sqrt_alphas[: idx[0] + 1])]
    a_s = np.array(first + [np.prod(sqrt_alphas[idx[i - 1] + 1 : idx[i] + 1]) for i in range(1, 7)])
    a_s_prev = a_s.copy()
    a_s_prev[-1] = 1
    return np.sqrt(1 - a_s**2), a_s, np.sqrt(1 - np.cumprod(a_s) ** 2), a_s_prev


def recovery_chain(net, tilde_x, t, noise, num_steps, noise_scale=1.0):
    sigmas, _, sigmas_cum, a_s_prev = (torch.from_numpy(values) for values in recovery_constants())
    is_recovery = (t + 1 < 6).double()
    sigma, a_s = (each[t + 1].view(-1, 1, 1, 1) for each in (sigmas, a_s_prev))
    step_size_square = sigmas_cum[t].view(-1, 1, 1, 1) / sigmas_cum[0] * 2e-4 * sigma**2

    def log_prob(y):
        pull = ((y - tilde_x) ** 2 / 2 / sigma**2 * is_recovery.view(-1, 1, 1, 1)).sum((1, 2, 3))
        return -net(y, t) / step_size_square.flatten() - pull

    y = tilde_x
    for k in range(num_steps):
        y = y + 0.5 * step_size_square * gradient(log_prob, y) + step_size_square.sqrt() * noise(k, y) * noise_scale
    return y / a_s


@STEPS
@pytest.mark.parametrize("given", [True, False], ids=["each level", "drawn"])
def test_recovery_likelihood(given, num_steps):
    net = Leveled(0.02)
    recipe = recipes.recovery_likelihood(net, **overrides(num_steps))
    real, level = real_images(low=-1), torch.tensor([0, 5, 3, 1, 5])
    negatives = recipe.negatives(real, **WHERE, level=level if given else None)
    t = negatives.level
    assert not given or torch.equal(t, level)
    sigmas, a_s, sigmas_cum, a_s_prev = (torch.from_numpy(each) for each in recovery_constants())
    column = (-1, 1, 1, 1)
    x_t = a_s.cumprod(0)[t].view(column) * real + sigmas_cum[t].view(column) * at_address(real.shape, Stream.DATA_NOISE)
    above = at_address(real.shape, Stream.NOISY_START)
    tilde_x = a_s[t + 1].view(column) * x_t + sigmas[t + 1].view(column) * above
    assert_close(negatives.data, x_t)
    assert_close(negatives.start, tilde_x)
    x_neg = recovery_chain(net, tilde_x, t, noise_of(SEED, FIRST, IDS), recipe.num_steps)
    assert_close(negatives.x, x_neg)
    a = a_s_prev[t + 1].view(column)
    weights = 1.0 / (sigmas[t + 1] / sigmas[1])
    wanted = (weights * (net(a * x_t, t) - net(a * negatives.x, t))).mean()
    assert_same_loss(net, recipe.loss(net, real, negatives), wanted)


def test_generation_by_recovery_likelihood():
    net = Leveled(0.02)
    recipe = recipes.recovery_likelihood(net, num_steps=4, engine="autograd")
    x = x0 = at_address((5, 1, 8, 8), Stream.INITIAL)
    for done, t in enumerate(range(5, -1, -1)):
        x = recovery_chain(net, x, torch.full((5,), t), noise_of(SEED, 4 * done, IDS), 4, noise_scale=0.99)
    assert_close(recipe.generate(x0, seed=SEED, chain_ids=IDS), x)


def test_levels_are_drawn_evenly():
    """A level for each chain from its own random number: chi-squared over 6 levels, 5 degrees of freedom."""
    recipe = recipes.recovery_likelihood(lambda x, level: 0 * x.flatten(1).sum(1), num_steps=1, engine="autograd")
    levels = recipe.negatives(torch.zeros(6000, 1), seed=3).level
    counts = levels.bincount(minlength=6).double()
    assert len(counts) == 6
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 20.5  # p = 0.001
    half = recipe.negatives(torch.zeros(3000, 1), seed=3, chain_ids=3000).level
    assert torch.equal(half, levels[3000:])


class Proposal(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.layer = nn.Conv2d(1, 1, 3, padding=1)
        self.double()

    def forward(self, x, log_snr):
        return 0.9 * x + 0.1 * self.layer(x) * log_snr.view(-1, 1, 1, 1)


def log_snr_of(level):
    b = torch.arctan(torch.exp(torch.tensor(-0.5 * 9.8, dtype=F64)))
    a = torch.arctan(torch.exp(torch.tensor(-0.5 * -5.1, dtype=F64))) - b
    return -2.0 * torch.log(torch.tan(a * (level.double() / 6) + b))


def cdrl_chain(net, start, xt, level, noise, num_steps):
    """The function `Langevin` of CDRL's `main_uncond.py`."""
    a_t, a_before = torch.sigmoid(log_snr_of(level)), torch.sigmoid(log_snr_of(level - 1))
    is_final = (level == 6).double()
    as_mul = torch.where(level == 6, 1.0, a_t / a_before)
    ct_square = (1 - a_before).sqrt() / math.sqrt(1 - 1 / (1 + math.exp(-9.8)))
    sz_square = (4e-4 * ct_square * (1 - a_t / a_before)).view(-1, 1, 1, 1)

    def en(x):
        pull = ((x - xt) ** 2).sum((1, 2, 3)) * ct_square * 2e-4 * (1 - is_final)
        return -net(x, log_snr_of(level - 1)) - pull

    x = start
    for k in range(num_steps):
        x = x + 0.5 * gradient(en, x)
        x = x + sz_square.sqrt() * noise(k, x)
    return x / (as_mul.sqrt() + 1e-8).view(-1, 1, 1, 1)


def cdrl_proposal(proposal, xt, level, noise):
    a_t, a_before = torch.sigmoid(log_snr_of(level)), torch.sigmoid(log_snr_of(level - 1))
    as_mul = torch.where(level == 6, 1.0, a_t / a_before)
    beta_tilt = (1 - a_before) / (1 - a_t) * (1 - a_t / a_before)
    return proposal(xt, log_snr_of(level)) + (beta_tilt * as_mul).sqrt().view(-1, 1, 1, 1) * noise


@STEPS
def test_cdrl(num_steps):
    net, proposal = Leveled(0.02), Proposal()
    recipe = recipes.cdrl(net, proposal, **overrides(num_steps))
    real, level = real_images(low=-1), torch.tensor([1, 6, 3, 2, 6])
    negatives = recipe.negatives(real, **WHERE, level=level)
    column = (-1, 1, 1, 1)
    shared = at_address(real.shape, Stream.DATA_NOISE)

    def forward(t):
        logsnr = log_snr_of(t).view(column)
        return real * torch.sigmoid(logsnr).sqrt() + torch.sigmoid(-logsnr).sqrt() * shared

    xt, before = forward(level), forward(level - 1)
    assert_close(negatives.noisier, xt)
    assert_close(negatives.data, before)
    noise = at_address(real.shape, Stream.NOISY_START)
    start = cdrl_proposal(proposal, xt, level, noise)
    assert_close(negatives.start, start.detach())
    x_neg = cdrl_chain(net, start.detach(), xt, level, noise_of(SEED, FIRST, IDS), recipe.num_steps)
    assert_close(negatives.x, x_neg)
    a_t, a_before = torch.sigmoid(log_snr_of(level)), torch.sigmoid(log_snr_of(level - 1))
    as_mul = torch.where(level == 6, 1.0, a_t / a_before).sqrt().view(column)
    sigma_1 = (1 - torch.sigmoid(log_snr_of(torch.tensor(1))) / torch.sigmoid(log_snr_of(torch.tensor(0)))).sqrt()
    weight = 1.0 / ((1 - a_t / a_before).sqrt() / sigma_1)
    at = log_snr_of(level - 1)
    pos_loss = -(-net(before * as_mul, at) * weight).mean()
    neg_loss = (-net(negatives.x * as_mul, at) * weight).mean()
    found = recipe.loss(net, real, negatives)
    torch.testing.assert_close(found, pos_loss + neg_loss, rtol=1e-6, atol=1e-9)
    wanted = ((negatives.x * as_mul - start) ** 2).sum((1, 2, 3)).mean()
    torch.testing.assert_close(recipe.proposal_loss(negatives), wanted, rtol=1e-6, atol=1e-9)
    assert recipe.proposal_loss(negatives).requires_grad


def test_generation_by_cdrl():
    net, proposal = Leveled(0.02), Proposal()
    recipe = recipes.cdrl(net, proposal, num_steps=3, engine="autograd")
    x = x0 = at_address((5, 1, 8, 8), Stream.INITIAL)
    for done, each in enumerate(range(6, 0, -1)):
        level = torch.full((5,), each)
        start = cdrl_proposal(proposal, x, level, at_address(x.shape, Stream.NOISY_START, 3 * done)).detach()
        x = cdrl_chain(net, start, x, level, noise_of(SEED, 3 * done, IDS), 3)
    a_t, a_before = torch.sigmoid(log_snr_of(level))[0], torch.sigmoid(log_snr_of(level - 1))[0]
    sigma_cum = (1 - a_before).sqrt()
    sz_square = 2e-4 * sigma_cum / math.sqrt(1 - 1 / (1 + math.exp(-9.8))) * (1 - a_t / a_before)
    as_mul = a_t / a_before
    score = gradient(lambda y: -net(y * as_mul.sqrt(), log_snr_of(level - 1)) / sz_square, x)
    x = (x + sigma_cum**2 * score) / a_before.sqrt()
    torch.testing.assert_close(recipe.generate(x0, seed=SEED, chain_ids=IDS), x, rtol=1e-5, atol=1e-6)


@STEPS
@pytest.mark.parametrize("mu", [0.3, 0.0])
def test_eqm(mu, num_steps):
    net = ConvNet()

    def field(x):
        return -gradient(net, x)

    recipe = recipes.eqm(field, lookahead=mu, **({} if num_steps is None else {"num_steps": num_steps}))
    assert num_steps or recipe.num_steps == 249
    real = real_images()
    negatives = recipe.negatives(real, **WHERE)
    x = at_address(real.shape, Stream.BUFFER_RESTART, 0, torch.float32).double()
    assert torch.equal(negatives.start, x)
    m = torch.zeros_like(x)
    for _ in range(recipe.num_steps):
        out = field(x + 0.0017 * m * mu)
        m = out
        x = x + out * 0.0017
    assert_close(negatives.x, x)


def test_loss_of_eqm():
    net = nn.Conv2d(1, 1, 3, padding=1).double()
    real = real_images()
    torch.manual_seed(5)
    found = recipes.eqm(net).loss(net, real, None)
    torch.manual_seed(5)
    x0, t = torch.randn_like(real), torch.rand(5, dtype=F64)
    ct = torch.minimum(torch.ones(5, dtype=F64), 1 / (1 - 0.8) - 1 / (1 - 0.8) * t) * 4
    t, ct = t.view(-1, 1, 1, 1), ct.view(-1, 1, 1, 1)
    xt, ut = t * real + (1 - t) * x0, (real - x0) * ct
    wanted = ((net(xt) - ut) ** 2).mean(dim=(1, 2, 3)).mean()
    assert_same_loss(net, found, wanted)


@STEPS
def test_vaebm(num_steps):
    net, layer = ConvNet(), nn.Linear(6, 64).double()
    log_std = math.log(0.1)

    def decoder(latents, noise):
        z1, z2 = latents
        mean = layer(torch.cat((z1, z2.flatten(1)), 1)).tanh().unflatten(1, (1, 8, 8))
        log_prob_z = -0.5 * (z1.square().sum(1) + z2.square().flatten(1).sum(1))
        return mean + 0.1 * noise, log_prob_z - (0.5 * noise.square() + log_std).sum((1, 2, 3))

    recipe = recipes.vaebm(net, decoder, [(2,), (1, 2, 2)], (1, 8, 8), **overrides(num_steps))
    real = real_images()
    negatives = recipe.negatives(real, **WHERE)
    flat = at_address((5, 70), Stream.BUFFER_RESTART, 0, torch.float32).double()
    xi = noise_of(SEED, FIRST, IDS)
    eps_z, eps_x = [flat[:, :2], flat[:, 2:6].unflatten(1, (1, 2, 2))], flat[:, 6:].unflatten(1, (1, 8, 8))
    assert_close(negatives.start, decoder(eps_z, eps_x)[0].detach())
    step_size = 8e-5
    for k in range(recipe.num_steps):
        parts = [part.detach().requires_grad_() for part in (*eps_z, eps_x)]
        neg_x, log_prob = decoder(parts[:-1], parts[-1])
        value = (net(neg_x) - log_prob).mean()
        grads = torch.autograd.grad(value, parts)
        noise = xi(k, flat).split([2, 4, 64], 1)
        moved = [
            part.detach() - 0.5 * step_size * grad * 5 + math.sqrt(step_size) * n.view_as(part)
            for part, grad, n in zip(parts, grads, noise, strict=True)
        ]
        eps_z, eps_x = moved[:-1], moved[-1]
    assert_close(negatives.x, decoder(eps_z, eps_x)[0].detach())
    wanted = net(real).mean() - net(negatives.x).mean()
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            wanted = wanted + 0.2 * torch.linalg.svdvals(module.weight.flatten(1))[0]
    assert_same_loss(net, recipe.loss(net, real, negatives), wanted)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 2, 2, 1])], ids=["p(x)", "p(x | y)"])
@pytest.mark.parametrize(("outer", "num_steps"), [(1.0, 10), (0.0, 10), (1.0, 1)])
def test_jem_pp(outer, num_steps, labels):
    """The adjoint of the first layer is frozen in the inner loop, and a batch norm is in train mode."""
    torch.manual_seed(0)
    first = nn.Conv2d(1, 4, 3, padding=1).double()
    rest = nn.Sequential(nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(256, 3)).double()
    rest[-1].weight.data *= 10  # so that the clip of gradients binds
    means = 0.3 * torch.randn(3, 1, 8, 8)
    covariances = torch.eye(64).expand(3, 64, 64) * 0.2
    recipe = recipes.jem_pp(
        first,
        rest,
        means=means,
        covariances=covariances,
        num_classes=0 if labels is None else 3,
        num_steps=num_steps,
        outer_step=outer,
    )
    buffer = recipe.buffer((1, 8, 8), seed=11, capacity=12, restart=0.2, dtype=F64)
    kept, clipped = {}, 0
    for _ in range(4):
        negatives = recipe.negatives(real_images(), buffer, labels=labels)
        draw = negatives.draw
        rows = []
        for slot, restarted, start in zip(draw.slots.tolist(), draw.restarted.tolist(), negatives.start, strict=True):
            rows.append(start if restarted else kept[slot])
        x_k = x = torch.stack(rows)
        assert float(x.abs().max()) <= 1
        for _ in range(num_steps):
            x = x_k.detach().requires_grad_()
            out = first(x)
            logits = rest(out)
            f = logits.logsumexp(1) if labels is None else logits.gather(1, labels[:, None])[:, 0]
            eta, p = torch.autograd.grad(f.sum(), (x, out))
            tmp = x.detach() + outer * eta
            for _ in range(5):
                step = gradient(lambda y, p=p: first(y) * p, tmp)
                clipped += int((step.abs() > 1).sum())
                tmp = (tmp + 0.2 * step.clamp(-1, 1)).clamp(-1, 1)
            x_k = tmp
        assert_close(negatives.x, x_k)
        kept |= dict(zip(draw.slots.tolist(), x_k, strict=True))
    assert rest.training
    assert clipped > 100
    classifier, y = nn.Sequential(first, rest), torch.tensor([0, 1, 2, 0, 1])
    real = real_images()
    logits = classifier(real)
    wanted = -(logits.logsumexp(1).mean() - classifier(negatives.x).logsumexp(1).mean()) + F.cross_entropy(logits, y)
    assert_same_loss(classifier, recipe.loss(classifier, real, negatives, y), wanted)


def test_starts_of_jem_pp():
    """The class of a chain has the mean and the covariance of its images, with 1e-4 on the diagonal; then a clamp."""
    num_samples = 4000
    means = torch.tensor([[0.2, -0.1], [-0.3, 0.0]])
    covariances = torch.tensor([[[0.04, 0.02], [0.02, 0.02]], [[0.01, 0.0], [0.0, 0.0]]])
    recipe = recipes.jem_pp(nn.Identity(), nn.Identity(), means=means, covariances=covariances)
    for label in (0, 1):
        x = recipe.start((num_samples, 2), seed=1, chain_ids=0, labels=torch.full((num_samples,), label)).double()
        wanted = covariances[label].double() + 1e-4 * torch.eye(2)
        error = 5 * 0.2 / num_samples**0.5  # five standard errors of the largest standard deviation
        assert_close(x.mean(0), means[label].double(), error)
        assert_close(x.T.cov(), wanted, 5 * 0.04 * (2 / num_samples) ** 0.5)
    assert float(x[:, 1].std()) == pytest.approx(0.01, rel=0.1)
