-- The two sizes by which tokens and features are numbered.
--
-- Grain:   one row.
-- Reads:   src_shape
-- Units:   context_length counts the tokens of a sequence: position = token_id % context_length.
-- Ask it:  how many features does the dictionary have?
create or replace view stg_shape as
select context_length, n_features, has_marginals from src_shape;
