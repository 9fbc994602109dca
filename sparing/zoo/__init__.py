"""The zoo: names, cards, weights, twins and measurements. It knows no model, only where each one lives."""
