# SPDX-License-Identifier: Apache-2.0
"""The streaming import against a copy and against upstream's import: speed and memory."""
