"""The tables of docs/software.md are those of the rows that run."""

import software_tables


def test_the_page_has_the_rows_of_the_table() -> None:
    text = software_tables.PAGE.read_text()
    assert software_tables.page(text) == text, "python tools/software_tables.py --write"


def test_every_list_says_where_it_is_from_and_what_it_was_checked_against() -> None:
    for facts in software_tables.SOFTWARE.values():
        assert facts.listed and facts.checked and facts.about
