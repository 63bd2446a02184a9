"""A reader sees whose kernels a number rests on, and how well they are known."""

import io

from moesim.report import facts
from moesim.report.run_view import print_facts
from moesim.scenario.software import SOFTWARE


def test_every_software_says_how_its_list_came_and_what_checked_it() -> None:
    assert all(len(known.listed) > 20 and len(known.checked) > 20 for known in SOFTWARE.values())
    assert len({known.listed for known in SOFTWARE.values()}) == len(SOFTWARE)


def test_the_screen_names_the_software(make_record) -> None:
    for known in SOFTWARE.values():
        said = {"name": known.name, "listed": known.listed, "checked": known.checked}
        out = io.StringIO()
        print_facts(make_record().result | {"software": said}, file=out, width=1000)
        assert all(text in out.getvalue() for text in said.values())


def test_a_result_of_an_earlier_version_says_nothing(make_record) -> None:
    assert facts.software({key: value for key, value in make_record().result.items() if key != "software"}) == []
