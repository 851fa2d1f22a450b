import pytest
from hypothesis import given
from hypothesis import strategies as st

from mech_align.errors import UnknownSite
from mech_align.sites import HEAD_PARTS, PARTS, ModelShape, Site, parse_layers, parse_sites, part_name

SHAPE = ModelShape(n_layers=3, n_heads=4, n_kv_heads=2, d_model=8, d_head=2, d_mlp=10, d_vocab=11, n_ctx=12)


@given(st.integers(0, 200), st.sampled_from(PARTS), st.integers(0, 99), st.sampled_from(["whole", "head", "neuron"]))
def test_text_and_site_are_inverse(layer: int, part: str, number: int, kind: str) -> None:
    if kind == "head":
        site = Site(layer, part if part in HEAD_PARTS else "z", head=number)
    else:
        site = Site(layer, "mlp_post", neuron=number) if kind == "neuron" else Site(layer, part)
    assert Site.parse(str(site)) == site == Site.parse(f" {str(site).lower()} ".replace("l", "L", 1))


@pytest.mark.parametrize(
    ("text", "site"),
    [("L10H7", Site(10, "z", head=7)), ("l3.MLP", Site(3, "mlp_out")), ("L3.attn", Site(3, "attn_out")),
     ("L0N17", Site(0, "mlp_post", neuron=17)), ("L2H1.q", Site(2, "q", head=1)), ("L1.resid", Site(1, "resid_post"))],
)  # fmt: skip
def test_the_grammar(text: str, site: Site) -> None:
    assert Site.parse(text) == site


@pytest.mark.parametrize(
    "text", ["", "L3", "H3", "L1H", "L1H2N3", "L1.nonsense", "L1H2.mlp", "L-1H2", "L1N2.z", "L1 H2"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UnknownSite):
        Site.parse(text)


def test_near_names_are_offered() -> None:
    with pytest.raises(UnknownSite, match="resid_post"):
        Site.parse("L1.resid_pos")
    assert part_name("mlp") == "mlp_out" and part_name("heads") == "z"
    with pytest.raises(UnknownSite):
        part_name("nothing like it")


@pytest.mark.parametrize(
    ("site", "says"),
    [(Site(3, "z"), "layers are 0 to 2"), (Site(0, "z", head=4), "heads are 0 to 3"),
     (Site(0, "k", head=2), "key-value heads are 0 to 1"), (Site(0, "mlp_post", neuron=10), "neurons are 0 to 9")],
)  # fmt: skip
def test_addresses_outside_the_model_name_the_range(site: Site, says: str) -> None:
    with pytest.raises(UnknownSite, match=says) as caught:
        site.check(SHAPE)
    assert "did you mean" in str(caught.value)


def test_inside_is_fine() -> None:
    for site in (Site(2, "z", head=3), Site(0, "v", head=1), Site(1, "mlp_post", neuron=9), Site(2, "resid_post")):
        assert site.check(SHAPE) is site


def test_lists_of_sites() -> None:
    assert parse_sites("L1H2, L0H3,L1H2", SHAPE) == [Site(1, "z", head=2), Site(0, "z", head=3)]
    assert parse_sites([Site(0, "q"), "L1.mlp"], SHAPE) == [Site(0, "q"), Site(1, "mlp_out")]
    for bad in ("", " , ", "L9H0"):
        with pytest.raises(UnknownSite):
            parse_sites(bad, SHAPE)


@pytest.mark.parametrize(
    ("text", "layers"),
    [("all", [0, 1, 2, 3]), (None, [0, 1, 2, 3]), ("2,1", [1, 2]), ("0-2", [0, 1, 2]), ("1..2", [1, 2]), ("-1", [3]),
     ([3, 0, 3], [0, 3]), ("-2,-1", [2, 3])],
)  # fmt: skip
def test_layers(text: str, layers: list[int]) -> None:
    assert parse_layers(text, 4) == layers


@pytest.mark.parametrize("text", ["4", "-5", "2-4", "3-1", "x", "", [], "1.5"])
def test_layers_that_are_none(text: str) -> None:
    with pytest.raises(UnknownSite):
        parse_layers(text, 4)
