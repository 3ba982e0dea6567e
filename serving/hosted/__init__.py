"""Hosted models as answerers. The provider SDKs live here and nowhere else."""
