"""A page of HTML: sections of text, tables and pictures, one below the other."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jinja2

_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ lead }}</p>
{% for section in sections %}
<h2>{{ section.title }}</h2>
<p>{{ section.text }}</p>
<table>
<tr>{% for head in section.columns %}<th>{{ head }}</th>{% endfor %}</tr>
{% for row in section.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% for picture, said in section.pictures %}
<figure><img src="{{ picture }}" alt="{{ said }}"><figcaption>{{ said }}</figcaption></figure>
{% endfor %}
{% endfor %}
</body>
</html>
"""  # noqa: E501 - HTML


@dataclass(frozen=True)
class Section:
    """A heading, a sentence, a table, and pictures: files beside the page, and what they show."""

    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    pictures: Sequence[tuple[str, str]] = field(default=())


def render(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Return the page; whatever it shows is escaped."""
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE)
    return template.render(title=title, lead=lead, sections=sections)
