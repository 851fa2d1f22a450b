import pytest
import torch

from mech_align.errors import UnknownSite
from mech_align.interventions import Edit, Intervention, add, add_source, patch, project_out, zero
from mech_align.sites import Site

X, S, V = torch.randn(3, 5, 4), torch.randn(3, 5, 4), torch.tensor([3.0, 0.0, 4.0, 0.0])


@pytest.mark.parametrize("edit", [patch(), zero(), add(V, 2.0), project_out(V), add_source()])
def test_edits_are_pure(edit: Edit) -> None:
    x, s = X.clone(), S.clone()
    out = edit.apply(x, s if edit.needs_source else None)
    assert out.shape == X.shape and torch.equal(x, X) and torch.equal(s, S)
    assert not torch.equal(out, X)


def test_what_they_do() -> None:
    assert torch.equal(patch().apply(X, S), S)
    assert torch.equal(zero().apply(X, None), torch.zeros_like(X))
    assert torch.allclose(add(V, 2.0).apply(X, None), X + 2 * V)
    assert torch.allclose(add_source().apply(X, S), X + S)
    gone = project_out(V).apply(X, None)
    assert torch.allclose(gone @ V, torch.zeros(3, 5), atol=1e-5)
    assert torch.allclose(project_out(V).apply(gone, None), gone, atol=1e-6)
    assert torch.allclose(gone - X, -((X @ V) / 25)[..., None] * V, atol=1e-6)


def test_a_source_that_is_missing_is_said() -> None:
    for edit in (patch(), add_source()):
        with pytest.raises(ValueError, match="source"):
            edit.apply(X, None)


def test_other_precisions() -> None:
    for edit in (patch(), add(V), project_out(V), zero()):
        assert edit.apply(X.bfloat16(), S if edit.needs_source else None).dtype == torch.bfloat16


def test_edits_of_one_name_are_told_apart() -> None:
    details = [add(V).detail, add(V, 2.0).detail, add(V + 1).detail, project_out(V).detail, project_out(V + 1).detail]
    assert len(set(details)) == len(details)
    assert add(V).detail == add(V.clone()).detail and zero() == zero() and patch() == patch()


def test_which_heads_and_neurons() -> None:
    assert Intervention(Site(1, "z", head=2), patch()).index == (2,)
    assert Intervention(Site(1, "mlp_post", neuron=2), patch()).index == (2,)
    assert Intervention(Site(1, "mlp_post"), patch(), neurons=(4, 5)).index == (4, 5)
    assert Intervention(Site(1, "mlp_post"), patch()).index is None
    assert str(Intervention(Site(1, "z", head=2), patch(), "last")) == "patch L1H2 at last"
    for site in (Site(1, "z"), Site(1, "mlp_post", neuron=1)):
        with pytest.raises(ValueError, match="neuron set"):
            Intervention(site, patch(), neurons=(1,))
    with pytest.raises(UnknownSite):
        Site(0, "mlp_out", head=1)
