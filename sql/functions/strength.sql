-- How strong a value is: the value itself or, in a signed run, its magnitude.
--
-- Grain:   scalar.
-- Reads:   src_is_signed
-- Units:   those of the value. A signed run is one whose autoencoder keeps values below zero (abstopk).
-- Ask it:  select strength(0.5)
create or replace macro strength(value) as
(case when src_is_signed() then abs(value) else value end);
