-- The values at many tokens, wherever they lie: groups of rows without one of them are passed over.
--
-- Grain:   one row per (token, feature) at which the feature fires, of the tokens given.
-- Reads:   src_values_at
-- Units:   value is in the units of the activations. A run of more than 67 million tokens is read in slices of so many.
-- Parameters: tokens bigint[]
-- Ask it:  what fires at these tokens?  from values_at((select list(token_id) from tokens_of_feature(12)))
create or replace macro values_at(tokens) as table
select token_id, feature_id, value from src_values_at(tokens);
