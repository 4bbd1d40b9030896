# SPDX-License-Identifier: Apache-2.0
"""Compare speed and memory of the streaming import, a copy, and upstream's import."""
