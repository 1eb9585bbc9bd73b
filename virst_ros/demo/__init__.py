# SPDX-License-Identifier: Apache-2.0
"""What ./scripts/demo runs; robots need none of it."""
