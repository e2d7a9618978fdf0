"""Schedules against published values, the process against the textbook, the sampler against a model with a known answer."""
import math

import pytest
import torch

import rodinhd as rh

BASE_ALPHA_BAR = {0.05: .873, 0.1: .742, 0.2: .490, 0.3: .283, 0.4: .139, 0.5: .0557, 0.6: .0169, 0.7: .00336, 0.8: 3.2e-4, 0.9: 5.2e-6}
UP_ALPHA_BAR = {0.05: .365, 0.1: .0949, 0.2: .00495, 0.3: 2.5e-4, 0.4: 1.2e-5, 0.5: 6.1e-7, 0.6: 3.1e-8, 0.7: 1.5e-9, 0.8: 7.5e-11}
LOG_SNR = {('cosine', 1000): [1.93, 1.05, -.04, -.93, -1.82, -2.83, -4.06, -5.69, -8.05, -12.2, -46.7],
           ('linear', 1000): [3.51, 2.16, .66, -.42, -1.42, -2.46, -3.63, -4.96, -6.48, -8.20, -10.1],
           ('sigmoid', 100): [-.55, -2.26, -5.30, -8.31, -11.3, -14.3, -17.3, -20.3, -23.3, -26.4, -37.3],
           ('linear', 100): [3.67, 2.24, .69, -.42, -1.44, -2.52, -3.75, -5.17, -6.81, -8.68, -10.8]}
AT = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@pytest.mark.parametrize(('name', 'T'), LOG_SNR)
def test_log_snr_table(name, T):
    alpha_bar = rh.Diffusion(name, T).alpha_bar
    for share, expected in zip(AT, LOG_SNR[name, T]):
        a = alpha_bar[round(share * T) - 1].item()
        assert math.log(a / (1 - a)) == pytest.approx(expected, abs=0.06 if abs(expected) > 9.99 else 0.006)


def test_alpha_bar_and_betas():
    for name, T, table, first in (('cosine', 1000, BASE_ALPHA_BAR, 2.452e-3), ('sigmoid', 100, UP_ALPHA_BAR, 0.1489)):
        process = rh.Diffusion(name, T)
        assert process.betas[0].item() == pytest.approx(first, rel=1e-3) and process.betas[-1].item() == 0.999
        for share, expected in table.items():
            assert process.alpha_bar[round(share * T) - 1].item() == pytest.approx(expected, rel=0.045)       # two digits are given


def test_posterior_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions add, means are weighted by them."""
    process = rh.Diffusion('cosine', 50)
    for t in (1, 10, 40):
        beta, before = process.betas[t].item(), process.alpha_bar[t - 1].item()
        precision = (1 - beta) / beta + 1 / (1 - before)
        x0, xt = 0.7, -0.4
        mean = (math.sqrt(1 - beta) * xt / beta + math.sqrt(before) * x0 / (1 - before)) / precision
        ones = torch.ones(1, 3, 1, 1, 1)
        ours, logvar = process.posterior(ones * x0, ones * xt, torch.tensor([t]))
        assert ours[0, 0].item() == pytest.approx(mean, rel=1e-5) and logvar.exp().item() == pytest.approx(1 / precision, rel=1e-5)


class Recorder:
    """A model that knows x_start, and writes down how it is called. `condition` is a Condition whose pooled part says where to go."""

    def __init__(self, process, target):
        self.process, self.target, self.calls = process, target, []

    def __call__(self, x, t, condition):
        self.calls.append((len(x), round(t[0].item(), 6)))
        index = (t * self.process.timesteps / 1000).round().long()
        a = self.process.at(self.process.alpha_bar, index)
        x_start = condition.pooled.view(-1, 1, 1, 1, 1) * torch.ones_like(x) if condition else self.target.expand_as(x)
        out = x_start if self.process.predict == 'x_start' else (x - a.sqrt() * x_start) / (1 - a).sqrt()
        return torch.cat([out, torch.zeros_like(out)], dim=2) if self.process.learned_variance else out


@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('kind', [('cosine', 1000, 'noise', True), ('sigmoid', 100, 'x_start', False)])
def test_sampling_finds_a_known_answer(kind, eta):
    process = rh.Diffusion(*kind)
    target = torch.rand(1, 3, 2, 4, 4) * 1.6 - 0.8
    model = Recorder(process, target)
    x = process.sample(model, lambda: torch.randn(2, 3, 2, 4, 4), eta=eta, steps=10)
    assert torch.allclose(x, target.expand_as(x), atol=1e-3)
    T = kind[1]
    times = [t * 1000 / T for t in (range(T - 1, 0, -T // 10))]         # 999, 899 ... 99 of 1000; 99, 89 ... 9 of 100
    assert model.calls == [(2, pytest.approx(t)) for t in times]


@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
def test_sampling_keeps_the_variance_of_the_process(eta):
    """For data that is 0 everywhere, x_t has variance 1 - alpha_bar_t at every step, whatever eta; with a learned variance at its lower
    bound, beta~, too; at its upper bound, beta, there is more of it."""
    def variances(learned=None):
        process, seen = rh.Diffusion('cosine', 1000, 'x_start', learned is not None), []
        def model(x, t, condition):
            a = process.alpha_bar[(t[0]).round().long()].item()
            seen.append((x.var().item(), 1 - a))
            zero = torch.zeros_like(x)
            return zero if learned is None else torch.cat([zero, zero + learned], dim=2)
        process.sample(model, lambda: torch.randn(1, 3, 4, 48, 48), eta=eta, steps=10)
        return zip(*seen)
    found, expected = variances()
    assert found == pytest.approx(expected, rel=0.05)
    if eta == 1:
        assert next(variances(-1.0)) == pytest.approx(expected, rel=0.05)
        more = list(next(variances(1.0)))
        assert more[-1] > 1.5 * expected[-1]


def test_guidance_extrapolates_and_costs_nothing_at_one():
    process = rh.Diffusion('sigmoid', 100, 'x_start')
    to, null = rh.Condition(torch.tensor([[0.3]]), {}), rh.Condition(torch.tensor([[0.1]]), {})
    model = Recorder(process, None)
    x = process.sample(model, lambda: torch.randn(1, 3, 1, 2, 2), to, null, guidance=2.0, steps=5)
    assert torch.allclose(x, torch.tensor(0.5), atol=1e-4) and all(n == 2 for n, _ in model.calls)      # 0.1 + 2 (0.3 - 0.1)
    model.calls.clear()
    x = process.sample(model, lambda: torch.randn(1, 3, 1, 2, 2), to, None, guidance=1.0, steps=5)
    assert torch.allclose(x, torch.tensor(0.3), atol=1e-4) and all(n == 1 for n, _ in model.calls)


def test_step_sizes_of_the_respaced_chain():
    """sigma at eta 1 from the first step (most noise) on: base 1.000, .992, .950 ...; the last update adds nothing."""
    expected = {('cosine', 1000): [0, .415, .548, .651, .739, .818, .889, .950, .992, 1.0],
                ('sigmoid', 100): [0, .929, .972, .975]}
    for (name, T), table in expected.items():
        alpha_bar = rh.Diffusion(name, T).alpha_bar
        times = [T // 10 * (i + 1) - 1 for i in range(10)]
        for i, sigma in enumerate(table):
            a, before = alpha_bar[times[i]].item(), alpha_bar[times[i - 1]].item() if i else 1.0
            assert math.sqrt((1 - before) / (1 - a) * (1 - a / before)) == pytest.approx(sigma, abs=1e-3)


def test_samples_do_not_depend_on_their_batch():
    class Half:
        config = rh.make_config('tiny')
        condition = staticmethod(lambda portrait: None)
        __call__ = staticmethod(lambda x, t, condition: x * 0.5)
    both, second = (rh.sample_stage('upsample', Half(), rh.Portrait(torch.zeros(n, 4), []), seed=seed) for n, seed in ((2, 1), (1, 2)))
    assert torch.equal(both[1:], second) and not torch.equal(both[:1], second)


def test_loss_terms():
    """A model that predicts the true noise has no mse; with its variance at the posterior's, the bound is 0 (t > 0)."""
    process = rh.Diffusion('cosine', 1000, 'noise', learned_variance=True)
    x_start, noise, t = torch.rand(2, 3, 1, 2, 2) - 0.5, torch.randn(2, 3, 1, 2, 2), torch.tensor([300, 700])
    seen = []
    def model(x, t, c):
        seen.append(t)
        return torch.cat([noise, -torch.ones_like(noise)], dim=2)
    terms, predicted = process.loss(model, x_start, t, noise)
    assert torch.equal(seen[0], torch.tensor([300.0, 700.0]))           # t * 1000 / T, here the same
    assert terms['mse'] == 0 and terms['vlb'].item() == pytest.approx(0, abs=1e-3)
    assert torch.allclose(predicted, x_start, atol=1e-2)
    up = rh.Diffusion('sigmoid', 100, 'x_start')
    terms, _ = up.loss(lambda x, t, c: seen.append(t) or x_start + 0.5, x_start, torch.tensor([3, 7]), noise)
    assert torch.equal(seen[1], torch.tensor([30.0, 70.0])) and terms['mse'].item() == pytest.approx(0.25)


def test_the_bound_trains_the_variance_alone():
    process = rh.Diffusion('cosine', 1000, 'noise', learned_variance=True)
    out = torch.randn(1, 3, 2, 2, 2, requires_grad=True)
    terms, _ = process.loss(lambda x, t, c: out, torch.zeros(1, 3, 1, 2, 2), torch.tensor([400]), torch.randn(1, 3, 1, 2, 2))
    grad, = torch.autograd.grad(terms['vlb'], out)
    assert grad[:, :, :1].abs().sum() == 0 and grad[:, :, 1:].abs().sum() > 0


def test_discretised_likelihood_sums_to_one():
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    mass = rh.discretised_log_likelihood(x, torch.tensor(0.2, dtype=torch.float64), torch.tensor(-1.5, dtype=torch.float64)).exp().sum()
    assert mass.item() == pytest.approx(1, abs=1e-3)
