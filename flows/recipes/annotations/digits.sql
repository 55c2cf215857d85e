-- Tokens that are digits alone, with or without a blank in front.
--
-- saeflow annotate digits flows/recipes/annotations/digits.sql
select token_id
from tokens
where regexp_full_match(piece, '\s?[0-9]+')
