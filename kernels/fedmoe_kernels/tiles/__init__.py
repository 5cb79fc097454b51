"""Which tile each kernel runs with on which GPU: tables, measured ones first."""
