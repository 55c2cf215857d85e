-- The features that fire at one token.
--
-- Grain:   one row per feature with a value at the token, the strongest first.
-- Reads:   stg_token_major (only the row groups of this token), strength
-- Units:   value is in the units of the activations; in a signed run the strongest have the largest magnitude.
-- Parameters: token bigint
-- Ask it:  what does the model see at token 4711?  from token_features(4711)
create or replace macro token_features(token) as table
select feature_id, value
from stg_token_major
where token_id = token and token between low and high
order by strength(value) desc, feature_id;
