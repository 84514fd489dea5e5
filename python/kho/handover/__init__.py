"""Operations on whole handovers: write, describe, attribute to owners, check, convert, compare, extract, draw."""
