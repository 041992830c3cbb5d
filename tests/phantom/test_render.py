from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vilmedic.phantom import FINDINGS
from vilmedic.phantom.case import SEVERITIES, Case, draw_case
from vilmedic.phantom.render import render


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [draw_case(11, "validate", index) for index in range(300)]


def test_every_finding_side_and_severity_occurs(cases: list[Case]) -> None:
    findings = [finding for case in cases for finding in case.findings]
    for name in FINDINGS:
        mine = [finding for finding in findings if finding.name == name]
        assert 0.12 < len(mine) / len(cases) < 0.30
        assert {finding.severity for finding in mine} == set(SEVERITIES[name])
        sides = {finding.side for finding in mine}
        assert sides == {""} if name == "Cardiomegaly" else sides >= {"right", "left"}
    normal = sum(not case.findings for case in cases) / len(cases)
    assert 0.30 < normal < 0.46


def test_findings_are_drawn_on_the_side_they_name(cases: list[Case]) -> None:
    for case in cases[:120]:
        upright = replace(case, view=replace(case.view, angle=0.0, shift=(0.0, 0.0)))
        for places in render(upright, 64).places.values():
            for place in places:
                x, y = place.centre
                left, top, right, bottom = place.box
                assert 0.0 <= left < x < right <= 1.0
                assert 0.0 <= top < y < bottom <= 1.0
                if place.side:
                    assert (x < 0.5) == (place.side == "right")


def test_findings_change_the_image_where_their_box_is(cases: list[Case]) -> None:
    seen = set()
    for case in cases[:150]:
        quiet = replace(case, view=replace(case.view, noise=0.0, blur=0.0, leads=0, gamma=1.0))
        names = [finding.name for finding in case.findings]
        if len(names) != 1 or names[0] == "Cardiomegaly":
            continue
        picture = render(quiet, 64)
        healthy = render(replace(quiet, findings=()), 64)
        change = np.abs(picture.pixels.astype(float) - healthy.pixels)
        inside = np.zeros((64, 64), bool)
        for place in picture.places[names[0]]:
            left, top, right, bottom = (round(64 * edge) for edge in place.box)
            inside[top:bottom, left:right] = True
        assert change[inside].max() > 25, (case.index, names)
        assert change[inside].mean() > 4 * change[~inside].mean(), (case.index, names)
        seen.add(names[0])
    assert seen == set(FINDINGS) - {"Cardiomegaly"}


def test_an_enlarged_heart_exceeds_half_the_chest(cases: list[Case]) -> None:
    for case in cases[:100]:
        enlarged = any(finding.name == "Cardiomegaly" for finding in case.findings)
        assert (case.body.heart_ratio > 0.5) == enlarged


@pytest.mark.parametrize("size", [32, 96, 200])
def test_any_size_gives_grey_pixels_of_that_size(size: int) -> None:
    pixels = render(draw_case(0, "train", 2), size).pixels
    assert pixels.shape == (size, size)
    assert pixels.dtype == np.uint8
    assert pixels.std() > 15
