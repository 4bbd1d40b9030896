# SPDX-License-Identifier: Apache-2.0
"""What goes wrong in a build, each told in one line: what was found, what was expected, what to do."""


class ForkError(Exception):
    """An error whose message is for the user; commands print it without a traceback."""


class EditError(ForkError):
    """A place that an edit names is missing or ambiguous."""


class UpstreamError(ForkError):
    """Upstream's wheel can't be had, or is not the one that is pinned."""
