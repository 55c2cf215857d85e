"""Text that acts on a terminal which obeys it: escape codes, rich's markup, marks of direction."""

from __future__ import annotations

import re

ACTS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""What a terminal would obey. Line ends are saeflow's own."""

HOSTILE = "\x1b]0;owned\x07\x1b[31mred\x9b5m\u202eback [bold]bold[/bold] [link=file:///etc]x[/link] :smiley: \r\x08"
"""A text that sets the title, turns red, blinks, runs backwards, is bold, is a link, is a face, and goes back."""
