-- The features with the most similar directions.
--
-- Grain:   one row per (feature, other feature), 50 for each feature.
-- Reads:   src_similar
-- Units:   cosine of their decoder rows, -1 to 1.
-- Ask it:  which features are nearly the same?
create or replace view stg_similar as
select feature_id, other_id, cosine from src_similar;
