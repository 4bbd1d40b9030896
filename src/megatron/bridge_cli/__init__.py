# SPDX-License-Identifier: Apache-2.0
"""The command line of Megatron-Bridge. Beside `megatron.bridge` and not in it, since importing that takes 10 s."""
