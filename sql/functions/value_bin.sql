-- The bin of a quarter octave that a value lies in.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   bin 4 * e + q holds the values from 2^e * (1 + q / 4) to below 2^e * (1 + (q + 1) / 4), q from 0 to 3. A
--          value below zero has the bin -2048 - b, where b is the bin of its magnitude: bins are in the order of
--          values.
-- Ask it:  select value_bin(1.6)  -- 2
create or replace macro value_bin(x) as
(
    if(x < 0, -2048, 0) + if(x < 0, -1, 1) * (
        4 * floor(log2(abs(x)::double)) + floor(4 * (abs(x)::double / pow(2, floor(log2(abs(x)::double))) - 1))
    )
)::bigint;
