-- The two sizes by which tokens and features are numbered, and what the tables have.
--
-- Grain:   one row.
-- Reads:   src_shape
-- Units:   context_length counts the tokens of a sequence: position = token_id % context_length. has_marginals and
--          has_sample are false if an earlier saeflow made some part, without these counts or without the sample;
--          has_offsets is false if one wrote some of the tokens, without their characters.
-- Ask it:  how many features does the dictionary have?
create or replace view stg_shape as
select context_length, n_features, has_marginals, has_sample, has_offsets from src_shape;
