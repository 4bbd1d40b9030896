# SPDX-License-Identifier: Apache-2.0
"""The machinery of the fork: fetch an upstream version, lay the stack of changes over it, pack the wheel."""
