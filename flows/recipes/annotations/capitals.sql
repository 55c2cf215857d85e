-- Tokens that begin with a capital letter, with or without a blank in front: `first` if small letters or nothing
-- follow, `all` if the token has two or more letters and all are capitals.
--
-- saeflow annotate capitals flows/recipes/annotations/capitals.sql
select token_id, if(regexp_full_match(piece, '\s?\p{Lu}{2,}'), 'all', 'first') as class
from tokens
where regexp_matches(piece, '^\s?\p{Lu}')
