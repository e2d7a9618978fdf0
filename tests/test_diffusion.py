"""Schedules against published values, the process against the textbook, the sampler against models
with a known answer."""
import math

import pytest
import torch

import rodinhd as rh
import running

BASE_ALPHA_BAR = {
    0.05: 0.873, 0.1: 0.742, 0.2: 0.490, 0.3: 0.283, 0.4: 0.139, 0.5: 0.0557, 0.6: 0.0169,
    0.7: 0.00336, 0.8: 3.2e-4, 0.9: 5.2e-6,
}
UP_ALPHA_BAR = {
    0.05: 0.365, 0.1: 0.0949, 0.2: 0.00495, 0.3: 2.5e-4, 0.4: 1.2e-5, 0.5: 6.1e-7, 0.6: 3.1e-8,
    0.7: 1.5e-9, 0.8: 7.5e-11,
}
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of T, in the table below
LOG_SNR = {
    ('cosine', 1000): (
        1.93, 1.05, -0.04, -0.93, -1.82, -2.83, -4.06, -5.69, -8.05, -12.2, -46.7,
    ),
    ('linear', 1000): (
        3.51, 2.16, 0.66, -0.42, -1.42, -2.46, -3.63, -4.96, -6.48, -8.20, -10.1,
    ),
    ('sigmoid', 100): (
        -0.55, -2.26, -5.30, -8.31, -11.3, -14.3, -17.3, -20.3, -23.3, -26.4, -37.3,
    ),
    ('linear', 100): (
        3.67, 2.24, 0.69, -0.42, -1.44, -2.52, -3.75, -5.17, -6.81, -8.68, -10.8,
    ),
}


# Schedules ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(('name', 'T'), LOG_SNR)
def test_log_snr_table(name, T):
    alpha_bar = rh.Diffusion(name, T).alpha_bar
    for share, expected in zip(SHARES, LOG_SNR[name, T], strict=True):
        a = alpha_bar[round(share * T) - 1].item()
        last_digit = 0.06 if abs(expected) > 9.99 else 0.006
        assert math.log(a / (1 - a)) == pytest.approx(expected, abs=last_digit)


@pytest.mark.parametrize(
    ('name', 'T', 'table', 'first'),
    [('cosine', 1000, BASE_ALPHA_BAR, 2.452e-3), ('sigmoid', 100, UP_ALPHA_BAR, 0.1489)],
)
def test_alpha_bar_and_betas(name, T, table, first):
    process = rh.Diffusion(name, T)
    assert process.betas[0].item() == pytest.approx(first, rel=1e-3)
    assert process.betas[-1].item() == 0.999
    for share, expected in table.items():
        found = process.alpha_bar[round(share * T) - 1].item()
        assert found == pytest.approx(expected, rel=0.045)  # two digits are given


def test_posterior_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions add,
    means are weighted by them."""
    process = rh.Diffusion('cosine', 50)
    for t in (1, 10, 40):
        beta = process.betas[t].item()
        before = process.alpha_bar[t - 1].item()
        x_start = 0.7
        x_t = -0.4
        precision = (1 - beta) / beta + 1 / (1 - before)
        of_t = math.sqrt(1 - beta) * x_t / beta
        of_start = math.sqrt(before) * x_start / (1 - before)
        mean = (of_t + of_start) / precision

        ones = torch.ones(1, 3, 1, 1, 1)
        ours, logvar = process.posterior(ones * x_start, ones * x_t, torch.tensor([t]))
        assert ours[0, 0].item() == pytest.approx(mean, rel=1e-5)
        assert logvar.exp().item() == pytest.approx(1 / precision, rel=1e-5)


# The sampler --------------------------------------------------------------------------------------
class Recorder:
    """A model that knows x_start, and writes down how it is called.

    x_start is `target` or, where there is a Condition, the number in its pooled part.
    """
    def __init__(self, process, target=None):
        self.process = process
        self.target = target
        self.calls = []  # (batch, time)

    def x_start(self, x, condition):
        if condition:
            return condition.pooled.view(-1, 1, 1, 1, 1) * torch.ones_like(x)
        return self.target.expand_as(x)

    def __call__(self, x, t, condition):
        self.calls.append((len(x), round(t[0].item(), 6)))
        out = self.x_start(x, condition)
        if self.process.predict == 'noise':
            index = (t * self.process.timesteps / 1000).round().long()
            a = self.process.entries('alpha_bar', index)
            out = (x - a.sqrt() * out) / (1 - a).sqrt()
        if self.process.learned_variance:
            out = torch.cat([out, torch.zeros_like(out)], dim=2)
        return out


@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    'kind', [('cosine', 1000, 'noise', True), ('sigmoid', 100, 'x_start', False)]
)
def test_sampling_finds_a_known_answer(kind, eta):
    process = rh.Diffusion(*kind)
    target = torch.rand(1, 3, 2, 4, 4) * 1.6 - 0.8
    model = Recorder(process, target)
    x = process.sample(model, lambda: torch.randn(2, 3, 2, 4, 4), eta=eta, steps=10)
    assert torch.allclose(x, target.expand_as(x), atol=1e-3)

    # 999, 899 ... 99 of 1000; 99, 89 ... 9 of 100
    T = process.timesteps
    times = [t * 1000 / T for t in range(T - 1, 0, -T // 10)]
    assert model.calls == [(2, pytest.approx(t)) for t in times]


def variances(eta, learned=None):
    """The variance of x_t at each step of sampling, and 1 - alpha_bar_t, for data that is 0
    everywhere. learned: what the model says of the variance; None for a fixed one."""
    process = rh.Diffusion('cosine', 1000, 'x_start', learned is not None)
    found = []
    expected = []

    def model(x, t, condition):
        found.append(x.var().item())
        expected.append(1 - process.alpha_bar[t[0].round().long()].item())
        zero = torch.zeros_like(x)
        return zero if learned is None else torch.cat([zero, zero + learned], dim=2)

    process.sample(model, lambda: torch.randn(1, 3, 4, 48, 48), eta=eta, steps=10)
    return found, expected


@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
def test_sampling_keeps_the_variance_of_the_process(eta):
    """x_t has variance 1 - alpha_bar_t at every step, whatever eta; with a learned variance at its
    lower bound, beta~, too; at its upper bound, beta, there is more of it."""
    found, expected = variances(eta)
    assert found == pytest.approx(expected, rel=0.05)
    if eta == 1:
        lower, _ = variances(eta, -1.0)
        assert lower == pytest.approx(expected, rel=0.05)
        upper, _ = variances(eta, 1.0)
        assert upper[-1] > 1.5 * expected[-1]


def test_guidance_extrapolates_and_costs_nothing_at_one():
    process = rh.Diffusion('sigmoid', 100, 'x_start')
    shown = rh.Condition(torch.tensor([[0.3]]), {})
    null = rh.Condition(torch.tensor([[0.1]]), {})
    model = Recorder(process)

    def draw():
        return torch.randn(1, 3, 1, 2, 2)

    x = process.sample(model, draw, shown, null, guidance=2.0, steps=5)
    assert torch.allclose(x, torch.tensor(0.5), atol=1e-4)  # 0.1 + 2 (0.3 - 0.1)
    assert all(n == 2 for n, _ in model.calls)
    model.calls.clear()
    x = process.sample(model, draw, shown, None, guidance=1.0, steps=5)
    assert torch.allclose(x, torch.tensor(0.3), atol=1e-4)
    assert all(n == 1 for n, _ in model.calls)


@pytest.mark.parametrize(
    ('name', 'T', 'sigmas'),
    [
        ('cosine', 1000, (0, 0.415, 0.548, 0.651, 0.739, 0.818, 0.889, 0.950, 0.992, 1.0)),
        ('sigmoid', 100, (0, 0.929, 0.972, 0.975)),
    ],
)
def test_step_sizes_of_the_respaced_chain(name, T, sigmas):
    """sigma at eta 1, from the last step, which adds nothing, to the first: base .992, 1.000."""
    alpha_bar = rh.Diffusion(name, T).alpha_bar
    times = [T // 10 * (i + 1) - 1 for i in range(10)]
    for i, sigma in enumerate(sigmas):
        a = alpha_bar[times[i]].item()
        before = alpha_bar[times[i - 1]].item() if i else 1.0
        found = math.sqrt((1 - before) / (1 - a) * (1 - a / before))
        assert found == pytest.approx(sigma, abs=1e-3)


def test_more_steps_than_timesteps_are_refused():
    process = rh.Diffusion('sigmoid', 100, 'x_start')
    for steps in (0, 101):
        with pytest.raises(ValueError, match=f'{steps} sampling steps of a process of 100'):
            process.sample(None, None, steps=steps)


class Half:
    """A network whose x_start is half of what it sees."""
    config = rh.make_config('tiny')

    def condition(self, portrait):
        return None

    def __call__(self, x, t, condition):
        return x * 0.5


def test_samples_do_not_depend_on_their_batch():
    def sampled(n, seed):
        portrait = rh.Portrait(torch.zeros(n, 4), [])
        return rh.sample_stage('upsample', Half(), portrait, seed=seed)

    both = sampled(2, seed=1)
    second = sampled(1, seed=2)
    assert torch.equal(both[1:], second)
    assert not torch.equal(both[:1], second)


def test_sampling_reports_its_steps():
    """`progress` wraps the steps, and `watch` sees each x_start; neither changes the sample."""
    steps = []
    seen = []

    def progress(iterable):
        for i in iterable:
            steps.append(i)
            yield i

    portrait = rh.Portrait(torch.zeros(1, 4), [])
    how = dict(steps=3, seed=1)
    quiet = rh.sample_stage('upsample', Half(), portrait, **how)
    loud = rh.sample_stage(
        'upsample', Half(), portrait, progress=progress, watch=seen.append, **how
    )
    assert steps == [2, 1, 0]
    assert len(seen) == 3
    assert torch.equal(loud, quiet)
    assert torch.equal(seen[-1], quiet)


# The loss -----------------------------------------------------------------------------------------
def test_loss_terms():
    """A model that predicts the true noise has no mse; with its variance at the posterior's, the
    bound is 0 (t > 0)."""
    process = rh.Diffusion('cosine', 1000, 'noise', learned_variance=True)
    x_start = torch.rand(2, 3, 1, 2, 2) - 0.5
    noise = torch.randn(2, 3, 1, 2, 2)
    seen = []

    def knows_noise(x, t, condition):
        seen.append(t)
        return torch.cat([noise, -torch.ones_like(noise)], dim=2)

    terms, predicted = process.loss(knows_noise, x_start, torch.tensor([300, 700]), noise)
    assert torch.equal(seen[0], torch.tensor([300.0, 700.0]))  # t * 1000 / T, here the same
    assert terms['mse'] == 0
    assert terms['vlb'].item() == pytest.approx(0, abs=1e-3)
    assert torch.allclose(predicted, x_start, atol=1e-2)

    def is_off_by_a_half(x, t, condition):
        seen.append(t)
        return x_start + 0.5

    process = rh.Diffusion('sigmoid', 100, 'x_start')
    terms, _ = process.loss(is_off_by_a_half, x_start, torch.tensor([3, 7]), noise)
    assert torch.equal(seen[1], torch.tensor([30.0, 70.0]))
    assert terms['mse'].item() == pytest.approx(0.25)


def test_the_bound_trains_the_variance_alone():
    process = rh.Diffusion('cosine', 1000, 'noise', learned_variance=True)
    out = torch.randn(1, 3, 2, 2, 2, requires_grad=True)
    x_start = torch.zeros(1, 3, 1, 2, 2)
    noise = torch.randn(1, 3, 1, 2, 2)
    terms, _ = process.loss(lambda x, t, condition: out, x_start, torch.tensor([400]), noise)
    grad, = torch.autograd.grad(terms['vlb'], out)
    assert grad[:, :, :1].abs().sum() == 0
    assert grad[:, :, 1:].abs().sum() > 0


def test_discretised_likelihood_sums_to_one():
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    mean = torch.tensor(0.2, dtype=torch.float64)
    log_std = torch.tensor(-1.5, dtype=torch.float64)
    mass = rh.discretised_log_likelihood(x, mean, log_std).exp().sum()
    assert mass.item() == pytest.approx(1, abs=1e-3)


def test_a_correction_takes_the_place_of_x_start():
    """What is sampled is what `correct` returned last, and later steps start from it."""
    diffusion = rh.Diffusion('linear', 10, predict='x_start')
    seen = []

    def model(x, t, condition):
        return torch.zeros_like(x)

    def correct(x_start):
        seen.append(x_start)
        return x_start + 0.25

    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.randn(1, 3, 4, 8, 8, generator=generator)

    watched = []
    out = diffusion.sample(model, draw, steps=3, eta=0.0, correct=correct, watch=watched.append)
    assert len(seen) == 3
    assert all((x == 0).all() for x in seen)
    assert all((x == 0.25).all() for x in [out, *watched])


def test_a_share_of_the_upsampled_density_is_kept():
    config = rh.make_config('tiny', ['up_density=0.25'])
    planes, low = torch.randn(2, 3, 8, 32, 32), torch.randn(2, 3, 8, 8, 8)
    soft = rh.resize_planes(low, 32)
    with torch.autocast('cpu', torch.bfloat16):
        made = rh.softened(planes.clone(), low, config)
    assert torch.equal(made[:, :, :6], planes[:, :, :6])
    expected = soft[:, :, 6:] + 0.25 * (planes - soft)[:, :, 6:]
    assert torch.allclose(made[:, :, 6:], expected, atol=1e-6)
    whole = rh.make_config('tiny', ['up_density=1'])
    assert rh.softened(planes, low, whole) is planes


def test_avatars_of_a_vector_take_steps_of_their_own(tiny):
    config = rh.make_config('tiny', ['latent_width=4', 'sample_steps=3'])
    portrait = rh.nobody(config, 1, torch.ones(1, 4))
    assert rh.of_vector(portrait)
    assert not rh.of_vector(portrait._replace(vector=None))
    assert not rh.of_vector(portrait._replace(latent=portrait.latent + 1))
    models = {kind: running.build(kind, config).eval() for kind in ('vae', 'base', 'upsample')}
    for steps, expected in ((None, 1), (2, 2)):
        calls = []
        rh.generate(models, portrait, steps=steps, quick=True, watch=calls.append)
        assert len(calls) == expected


def test_low_resolution_planes_are_the_mean_of_samples(tiny):
    models = {kind: running.build(kind, tiny).eval() for kind in ('vae', 'base', 'upsample')}
    torch.nn.init.normal_(models['base'].conv_out.weight, std=0.1)  # which is zero at first
    how = dict(steps=2, quick=True)
    first, second = (rh.generate(models, 1, seed=s, **how).low for s in (3, 3 + rh.FAR_SEED))
    both = rh.generate(models, 1, seed=3, samples=2, **how).low
    assert not torch.equal(first, second)
    assert torch.allclose(both, (first + second) / 2, atol=1e-6)


def test_the_upsample_model_takes_steps_of_its_own(tiny):
    config = rh.make_config('tiny', ['sample_steps=3', 'up_sample_steps=2'])
    models = {kind: running.build(kind, config).eval() for kind in ('vae', 'base', 'upsample')}
    for steps, expected in ((None, 3 + 2), (1, 1 + 1)):
        calls = []
        rh.generate(models, 1, steps=steps, watch=calls.append)
        assert len(calls) == expected
